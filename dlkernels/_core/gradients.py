"""First and second derivatives by torch.func, and the copies that an autograd Function gets in compiled code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dlkernels._core.private_copy import private_copy
from dlkernels._core.private_torch import unwrap_dead_wrappers

__all__ = ["Tensors", "differentiate", "private", "pullback"]

Tensors = tuple[Tensor, ...]


def private(tensors: Sequence[Tensor | None], first_weight: int | None = None) -> Sequence[Tensor | None]:
    """The tensors to pass to an autograd Function: `tensors` themselves, or copies of them in compiled code. Compiled
    code does not check version counters, so if it edits an input after the call, the backward would read the edited
    values. Dynamo also refuses a Function that gets the same tensor twice.

    There are two kinds of copies. Tensors that require a gradient and all weights (from `first_weight` on) are cloned,
    and the compiler removes the clone if nothing edits the original. All other tensors may be inputs of the graph,
    whose clones Inductor removes even if they are edited, so `private_copy` copies them."""
    if not torch.compiler.is_compiling():
        return tensors
    weights_at = len(tensors) if first_weight is None else first_weight
    return [
        None if tensor is None else tensor.clone() if at >= weights_at or tensor.requires_grad else private_copy(tensor)
        for at, tensor in enumerate(tensors)
    ]


def pullback(
    forward: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The vector-Jacobian product of `forward`: a gradient for every input, None for the inputs that are None or of an
    integer or boolean dtype.

    An output whose cotangent is None does not contribute. The computation uses torch.func, so it also works under
    functorch and can be differentiated again.
    """
    inputs, cotangents = unwrap_dead_wrappers(tuple(inputs)), unwrap_dead_wrappers(tuple(cotangents))
    present = [i for i, tensor in enumerate(inputs) if tensor is not None and tensor.is_floating_point()]
    counted = [i for i, tensor in enumerate(cotangents) if tensor is not None]

    def outputs(*tensors: Tensor) -> Tensors:
        full = list(inputs)
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        results = forward(*full)
        return tuple(results[i] for i in counted)  # type: ignore[misc]

    vjp: Callable[..., Tensors] = torch.func.vjp(outputs, *(inputs[i] for i in present))[1]
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, vjp(tuple(cotangents[i] for i in counted)), strict=True):
        grads[i] = grad
    return grads


def differentiate(
    gradients: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The second derivative: the vector-Jacobian product of `gradients` for the wanted inputs, None for the others."""

    def of_wanted(*tensors: Tensor | None) -> Sequence[Tensor | None]:
        return gradients(*(t if want else fixed for t, want, fixed in zip(tensors, wanted, inputs, strict=True)))

    variable = [tensor if want else None for tensor, want in zip(inputs, wanted, strict=True)]
    return pullback(of_wanted, variable, cotangents)
