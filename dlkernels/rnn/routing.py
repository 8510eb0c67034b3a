"""Decides how a recurrent call runs."""

from __future__ import annotations

from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.dtypes import CUDA_KERNEL_DTYPES, KERNEL_DTYPES
from dlkernels._core.routing import Route, no_kernel, with_kernel

__all__ = ["route"]


def _why_no_kernel(x: Tensor, projected: bool) -> str:
    """Why there is no kernel for this input; empty if there is one."""
    kind = x.device.type
    if kind not in ("cpu", "cuda"):
        return f"no kernel for {kind} tensors"
    if kind == "cuda" and not extension.HAVE_CUDA_KERNELS:
        return f"the compiled module has no CUDA kernels: {extension.why_no_cuda}"
    if x.dtype not in (KERNEL_DTYPES if kind == "cpu" else CUDA_KERNEL_DTYPES):
        return f"no kernel for {x.dtype} on {kind}"
    if kind == "cuda" and projected:
        return "no CUDA kernel for projections"
    return ""


def route(*tensors: Tensor | None, projected: bool = False) -> Route:
    """The route of a call with these tensors, made now. The first tensor is the input, and all have one device and
    dtype. `projected` tells that the layer has a proj_size.

    Raises NotImplementedError if one of them carries a forward-mode tangent.
    """
    x = tensors[0]
    assert x is not None
    if not extension.HAVE_NATIVE:
        return no_kernel(f"no compiled kernels: {extension.why_not}")
    reason = _why_no_kernel(x, projected)
    return no_kernel(reason) if reason else with_kernel(tensors)
