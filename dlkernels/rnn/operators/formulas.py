"""First-order gradients of layers and cells in PyTorch operations, which double backward differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dlkernels._core.gradients import Tensors, pullback
from dlkernels.rnn import reference
from dlkernels.rnn.dtypes import dtype_of
from dlkernels.rnn.operators.arguments import CellConfig, Places, SequenceConfig, SequenceInputs


def run_sequence(cfg: SequenceConfig, given: SequenceInputs, **cut: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes a layer's call with PyTorch operations: (y, h_n, c_n, cells)."""
    x, h0, c0, _, batch_sizes, lengths, weights, resets = given
    if cfg.variant is not None:
        parts = variant_parts(cfg, weights)
        weights, cut["variant"] = parts.plain, _reference_variant(cfg, parts)
    y, h_n, c_n, *cells = reference.sequence(
        cfg.mode, x, h0, c0, weights, batch_sizes, lengths, cfg.bidirectional, cfg.batch_first, cfg.bptt_steps,
        h_dtype=dtype_of(cfg.types.h, x), c_dtype=dtype_of(cfg.types.c, x), resets=resets, return_cells=cfg.cells,
        **cut,
    )  # fmt: skip
    return y, h_n, c_n, cells[0] if cells else c_n.new_empty(0)


class Parts(NamedTuple):
    """The weights of a call with a variant, apart."""

    plain: Sequence[Tensor]
    gains: Sequence[Tensor]
    dropout: Tensor | None
    mask_c: Tensor | None
    mask_h: Tensor | None


def variant_parts(cfg: SequenceConfig, weights: Sequence[Tensor]) -> Parts:
    variant, directions = cfg.variant, 2 if cfg.bidirectional else 1
    assert variant is not None
    last = len(weights) - variant.masks
    plain = variant.plain_count(cfg.mode, last // directions) * directions
    masks = iter(weights[last:])
    given = (next(masks) if there else None for there in (variant.dropout_mask, variant.mask_c, variant.mask_h))
    return Parts(weights[:plain], weights[plain:last], *given)


def _reference_variant(cfg: SequenceConfig, parts: Parts) -> reference.Variant:
    variant, gains = cfg.variant, None
    assert variant is not None
    if variant.normalised:
        count = len(parts.gains) // (2 if cfg.bidirectional else 1)
        gains = [reference.Gains(*parts.gains[at : at + count]) for at in range(0, len(parts.gains), count)]
    return reference.Variant(
        gains, variant.eps, parts.dropout, variant.zoneout_c if parts.mask_c is None else parts.mask_c,
        variant.zoneout_h if parts.mask_h is None else parts.mask_h,
    )  # fmt: skip


def run_cell(
    cfg: CellConfig, x: Tensor, h: Tensor | None, c: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Computes one step with PyTorch operations."""
    return reference.cell(
        cfg.mode, x, h, c, *weights, h_dtype=dtype_of(cfg.types.h, x),  # type: ignore[arg-type]
        c_dtype=dtype_of(cfg.types.c, x),
    )  # fmt: skip


def sequence_gradients(
    cfg: SequenceConfig, places: Places, cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients for inputs = (x, h0, c0, *weights) given cotangents = (dy, dh_n, dc_n, dcells), as the backward op has
    them.

    With truncation (bptt_steps) the first-order gradient is not a derivative of the outputs: the state that enters a
    cut step counts as a constant, but in the gradient formula it is still the value that all earlier steps produced.
    Therefore the states at the cuts are computed first, without cutting, and then take the place of the detached
    states. They are constants for the differentiation here and functions of every input for the one around it.
    """

    def run(x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor, **cut: Any) -> Tensors:
        return run_sequence(cfg, places.inputs(x, h0, c0, weights), **cut)

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
