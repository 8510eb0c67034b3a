"""Decides how a call runs; the entry points obey it and `explain` prints it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dlkernels import _native, triton

KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
CUDA_KERNEL_DTYPES = KERNEL_DTYPES - {torch.float64}


class Route(NamedTuple):
    """path: "op" (the operator alone), "eager" (the Function by its C++ apply), "function" (the Function by its Python
    apply, for functorch and Dynamo) or "reference" (PyTorch operations)."""

    path: str
    reason: str

    @property
    def native(self) -> bool:
        return self.path != "reference"


OP = Route("op", "no gradient is wanted: the operator is called directly")
EAGER = Route("eager", "a gradient is wanted: autograd Function around the operator")
TRACED = Route("function", "torch.compile traces the autograd Function around the operator")
TRANSFORMED = Route("function", "inside a torch.func transform: autograd Function with a vmap rule")
COMPILED_TRANSFORM = Route(
    "reference", "a torch.func transform inside torch.compile: Dynamo would drop the Function's own backward"
)

RECORDED = Route("reference", "torch.jit.trace records torch's operators: a saved file may hold them, with gradients")


def _no_kernel(reason: str) -> Route:
    return Route("reference", reason)


def _why_no_kernel(x: Tensor, projected: bool) -> str:
    """Empty where there is one for this input."""
    kind = x.device.type
    if kind not in ("cpu", "cuda"):
        return f"no kernel for {kind} tensors"
    if kind == "cuda" and not _native.HAVE_CUDA_KERNELS:
        return f"the compiled module has no CUDA kernels: {_native.why_no_cuda}"
    if x.dtype not in (KERNEL_DTYPES if kind == "cpu" else CUDA_KERNEL_DTYPES):
        return f"no kernel for {x.dtype} on {kind}"
    if kind == "cuda" and projected:
        return "no CUDA kernel for projections"
    return ""


def route(*tensors: Tensor | None, projected: bool = False) -> Route:
    """How a call with these tensors runs now; the first is the input. They are of one device and dtype. `projected`:
    of a layer with proj_size.

    Raises NotImplementedError when one of them carries a forward-mode tangent.
    """
    x = tensors[0]
    assert x is not None
    if not _native.HAVE_NATIVE:
        return _no_kernel(f"no compiled kernels: {_native.why_not}")
    reason = _why_no_kernel(x, projected)
    return _no_kernel(reason) if reason else _with_kernel(tensors)


def attention_route(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> Route:
    """As `route`, for attention, whose CUDA kernels are Triton's; its arguments have passed its checks."""
    if not q.is_cuda:
        return route(q, k, v, *others)
    reason = triton.why_not(q, v)
    return _no_kernel(reason) if reason else _with_kernel((q, k, v, *others))


def _with_kernel(tensors: tuple[Tensor | None, ...]) -> Route:
    compiling = torch.compiler.is_compiling()
    if not compiling and forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if not compiling and torch._C._is_tracing():
        return RECORDED
    if torch._C._are_functorch_transforms_active():
        return COMPILED_TRANSFORM if compiling else TRANSFORMED
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return TRACED if compiling else EAGER
    return OP


def _refuse_tangents(tensors: tuple[Tensor | None, ...]) -> None:
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                "dlkernels: forward-mode differentiation (jvp, jacfwd, dual tensors) is not supported; use "
                "reverse mode (vjp, jacrev, backward), or dlkernels.reference, which supports both"
            )
