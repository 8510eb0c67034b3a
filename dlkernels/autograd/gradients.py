"""First-order gradients written with PyTorch operations: what double backward differentiates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels import reference
from dlkernels.autograd.config import CellConfig, SequenceConfig
from dlkernels.ops import dtype_of
from dlkernels.ops.private_copy import private_copy

Tensors = tuple[Tensor, ...]


def private(tensors: Sequence[Tensor | None], first_weight: int | None = None) -> Sequence[Tensor | None]:
    """What a Function is given, in compiled code copies. Compiled code checks no versions: an input that it edits after
    the call would be read edited in the backward. And Dynamo refuses a Function that is given one tensor twice.

    There are two kinds of copies. Tensors that require a gradient and all weights (from `first_weight` on) are cloned,
    and the compiler removes the clone if nothing edits them. All others may be inputs of the graph, whose clones
    Inductor removes even if they are edited, so they go through `private_copy`."""
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
    """The gradient of `forward` for every input, None for those that are None.

    None among the cotangents: that output does not count. Uses torch.func, so it holds under functorch too and can be
    differentiated again.
    """
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]
    counted = [i for i, tensor in enumerate(cotangents) if tensor is not None]

    def outputs(*tensors: Tensor) -> Tensors:
        full: list[Tensor | None] = [None] * len(inputs)
        for i, tensor in zip(present, tensors, strict=True):
            full[i] = tensor
        results = forward(*full)
        return tuple(results[i] for i in counted)  # type: ignore[misc]

    vjp: Callable[..., Tensors] = torch.func.vjp(outputs, *(inputs[i] for i in present))[1]
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(present, vjp(tuple(cotangents[i] for i in counted)), strict=True):
        grads[i] = grad
    return grads


def run_sequence(
    cfg: SequenceConfig, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None, lengths: Tensor | None, **cut: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The call by PyTorch operations."""
    return reference.sequence(
        cfg.mode, x, h0, c0, weights, batch_sizes, lengths, cfg.bidirectional, cfg.batch_first, cfg.bptt_steps,
        h_dtype=dtype_of(cfg.types.h, x), c_dtype=dtype_of(cfg.types.c, x), **cut,
    )  # fmt: skip


def run_cell(
    cfg: CellConfig, x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same of one step."""
    return reference.cell(
        cfg.mode, x, h, c, *weights, h_dtype=dtype_of(cfg.types.h, x),  # type: ignore[arg-type]
        c_dtype=dtype_of(cfg.types.c, x),
    )  # fmt: skip


def sequence_gradients(
    cfg: SequenceConfig, batch_sizes: Tensor | None, lengths: Tensor | None, cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients for inputs = (x, h0, c0, *weights) given cotangents = (dy, dh_n, dc_n), as the backward op has them.

    Truncation (bptt_steps) makes the first-order gradient something else than a derivative of the outputs: the state
    that enters a cut step counts as a constant, but in the gradient formula it still is the value that all earlier
    steps produced. So the states at the cuts are computed first, without cutting, and then stand in for the detached
    ones: a constant for the differentiation here, a function of every input for the one around it.
    """

    def run(x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor, **cut: Any) -> Tensors:
        return run_sequence(cfg, x, h0, c0, weights, batch_sizes, lengths, **cut)

    if not cfg.bptt_steps:
        return pullback(run, inputs, cotangents)

    states: list[tuple[Tensor, Tensor | None]] = []

    def record(h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        states.append((h, c))
        return h, c

    run(*inputs, cut=record)  # type: ignore[arg-type]

    def truncated(*tensors: Tensor) -> Tensors:
        at_cuts = iter(states)
        return run(*tensors, cut=lambda h, c: next(at_cuts))

    return pullback(truncated, inputs, cotangents)


def cell_gradients(
    cfg: CellConfig, cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients for inputs = (x, h, c, w_ih, w_hh, b_ih, b_hh) given cotangents = (dh', dc')."""
    return pullback(lambda *tensors: run_cell(cfg, *tensors), inputs, cotangents)


def differentiate(
    gradients: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The second derivative: cotangents of `gradients(*inputs)` pulled back to the wanted inputs, else None."""

    def of_wanted(*tensors: Tensor | None) -> Sequence[Tensor | None]:
        return gradients(*(t if want else fixed for t, want, fixed in zip(tensors, wanted, inputs, strict=True)))

    variable = [tensor if want else None for tensor, want in zip(inputs, wanted, strict=True)]
    return pullback(of_wanted, variable, cotangents)
