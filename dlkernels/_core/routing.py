"""Chooses the path of a call, as far as the recurrent layers and attention do so in the same way. The entry points
follow the `Route`, and `explain` prints it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlkernels._core.private_torch import are_transforms_active, forward_ad, is_tracing

__all__ = ["Route", "no_kernel", "with_kernel"]


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


def no_kernel(reason: str) -> Route:
    """The route of a call that no kernel serves."""
    return Route("reference", reason)


def with_kernel(tensors: tuple[Tensor | None, ...]) -> Route:
    """The route of a call that a kernel serves.

    Raises NotImplementedError if a tensor carries a forward-mode tangent.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if not compiling and is_tracing():
        return RECORDED
    if are_transforms_active():
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
