"""Chooses the path of a call, as far as the recurrent layers and attention do so in the same way. The entry points
follow the `Route`, and `explain` prints it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlkernels._core import extension, tangents
from dlkernels._core.private_torch import are_transforms_active, forward_ad, is_tracing

__all__ = ["ONLY_SCALAR", "Route", "announce", "is_for_torch", "no_kernel", "or_torch", "with_kernel"]


class Route(NamedTuple):
    """path: "op" (the operator alone), "eager" (the Function by its C++ apply), "function" (the Function by its Python
    apply, for functorch and Dynamo), "reference" (PyTorch operations) or "torch" (torch's own operator)."""

    path: str
    reason: str
    warns: bool = False  # whether a warning tells the reason when the reference runs

    @property
    def native(self) -> bool:
        return self.path not in ("reference", "torch")

    @property
    def is_forward_mode(self) -> bool:
        """Whether it is a tangent that makes the call run on the reference."""
        return self.reason == FORWARD_MODE.reason


OP = Route("op", "no gradient is wanted: the operator is called directly")
EAGER = Route("eager", "a gradient is wanted: autograd Function around the operator")
TRACED = Route("function", "torch.compile traces the autograd Function around the operator")
TRANSFORMED = Route("function", "inside a torch.func transform: autograd Function with a vmap rule")
COMPILED_TRANSFORM = Route(
    "reference", "a torch.func transform inside torch.compile: Dynamo would drop the Function's own backward"
)

ONLY_SCALAR = "only scalar kernels exist for this processor"
TORCH = Route("torch", f"{ONLY_SCALAR}: torch's operator is faster")

FORWARD_MODE = Route(
    "reference", "a tensor carries a forward-mode tangent (jvp, jacfwd): the reference computes the derivatives"
)
RECORDED = Route("reference", "torch.jit.trace records torch's operators: a saved file may hold them, with gradients")


def no_kernel(reason: str, warns: bool = False) -> Route:
    """The route of a call that no kernel serves. `warns`: `announce` tells the reason, not `explain` alone."""
    return Route("reference", reason, warns)


def with_kernel(tensors: tuple[Tensor | None, ...]) -> Route:
    """The route of a call that a kernel serves."""
    compiling = torch.compiler.is_compiling()
    if not compiling and forward_ad._current_level >= 0 and tangents.are_carried(tensors):
        return FORWARD_MODE
    if not compiling and is_tracing():
        return RECORDED
    if are_transforms_active():
        return COMPILED_TRANSFORM if compiling else TRANSFORMED
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return TRACED if compiling else EAGER
    return OP


def is_for_torch(x: Tensor) -> bool:
    """Whether a call with this input runs on torch's operator, if that does what the call asks for. It cannot be mapped
    by vmap, and Dynamo leaves the graph for it, so what is traced or transformed stays with our operators."""
    return (
        extension.prefers_torch
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not is_tracing()
        and not are_transforms_active()
        and forward_ad._current_level < 0
    )


def or_torch(decided: Route, x: Tensor, missing: str) -> Route:
    """The route of a call for which torch has an operator too: torch's where that is faster, else `decided`, the route
    of our operator. `missing` names what the call asks for and torch's operator does not have."""
    if not decided.native or not x.is_cpu or not extension.prefers_torch:
        return decided
    if is_for_torch(x) and not missing:
        return TORCH
    why = f"torch's operator has no {missing}" if missing else "torch's operator cannot be traced or transformed"
    return decided._replace(reason=f"{decided.reason}; {ONLY_SCALAR}, but {why}")


def announce(decided: Route) -> None:
    """Tells the user once that calls run on the reference path, where that is not what `explain` alone has to tell."""
    if decided.is_forward_mode:
        extension.announce_forward_mode()
    elif decided.warns and extension.HAVE_NATIVE:
        if torch.compiler.is_compiling():  # Dynamo would leave the graph for a warning
            return
        extension.announce_no_kernel(decided.reason)
    else:
        extension.announce_reference()
