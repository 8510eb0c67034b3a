"""The operators of a layer with layer normalisation, zoneout and recurrent dropout: `lstm_variant`, `gru_variant` and
their backwards. `operators.sequence` calls them in place of the plain ones where `SequenceConfig.variant` is set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.devices import register_fake
from dlkernels._core.flops import register_formulas
from dlkernels.rnn import flops, records
from dlkernels.rnn.dtypes import dtype_of
from dlkernels.rnn.kinds import KINDS, Kind
from dlkernels.rnn.operators.arguments import SequenceConfig, SequenceInputs, Wanted
from dlkernels.rnn.operators.formulas import Parts, variant_parts

__all__ = ["MODES", "backward", "forward", "record_size", "register"]

MODES = ("lstm", "gru")
_MOMENTS = 8


def record_size(
    kind: Kind, hidden: int, normalised: bool, changes_c: bool, dtype: torch.dtype, device: torch.device
) -> int:  # fmt: skip
    """The size of the record of a row, in values of the compute type (layouts: csrc/rnn/cpu/variants/record.h and
    csrc/rnn/cuda/variants.h, which has c' before and after zoneout in any case). `dtype` is the type to which products
    may be rounded, and `changes_c` says whether there is zoneout of c."""
    others = kind.bounded + (1 if kind.has_cell_state else kind.narrow) + (2 * kind.gates if normalised else 0)
    of_c = kind.has_cell_state * (2 if changes_c or device.type == "cuda" else 1)
    moments = _MOMENTS if normalised else 0
    if records.has_halves(dtype, device):
        return records.of_slots(hidden, of_c, others) + moments
    return (of_c + others) * hidden + moments


def forward(cfg: SequenceConfig, given: SequenceInputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, saved, cells), as those of a plain layer; `saved` is [D, rows, `record_size`], cells are empty."""
    x, h0, c0, _, batch_sizes, lengths, _, resets = given
    assert resets is None
    assert not cfg.cells
    parts = variant_parts(cfg, given.weights)
    results = _operators[cfg.mode](
        x, h0, c0, *_tensors(parts), batch_sizes, lengths, *_numbers(cfg), cfg.bidirectional, cfg.batch_first, save,
        *cfg.types,
    )  # fmt: skip
    return (*results, results[2].new_empty(0))


def backward(
    cfg: SequenceConfig, wanted: Wanted, cotangents: Sequence[Tensor | None], given: SequenceInputs, saved: Tensor
) -> list[Tensor]:
    """[dx, dh0, dc0, *dweights] from cotangents = (dy, dh_n, dc_n, None); the gradients of masks are empty."""
    x, h0, c0, _, batch_sizes, lengths, _, _ = given
    parts = variant_parts(cfg, given.weights)
    grads = _backward_operators[cfg.mode](
        *cotangents[:3], x, h0, c0, *_tensors(parts), saved, batch_sizes, lengths, *_numbers(cfg), cfg.bidirectional,
        cfg.batch_first, cfg.bptt_steps, wanted.x, wanted.state, wanted.weights, cfg.types.product,
    )  # fmt: skip
    masks = sum(mask is not None for mask in (parts.dropout, parts.mask_c, parts.mask_h))
    return [*grads, *(x.new_empty(0) for _ in range(masks))]


def _tensors(parts: Parts) -> tuple[Any, ...]:
    return parts.plain, parts.gains, parts.dropout, parts.mask_c, parts.mask_h


def _numbers(cfg: SequenceConfig) -> tuple[float, float, float]:
    variant = cfg.variant
    assert variant is not None
    return variant.eps, variant.zoneout_c, variant.zoneout_h


def register(fake: Callable[..., Any], backward_fake: Callable[..., Any]) -> None:
    """Registers the fakes and the FLOP formulas. `fake` and `backward_fake` are those of the plain operators."""
    if not extension.HAVE_NATIVE:
        return

    def of_forward(
        kind: Kind, x: Tensor, weights: Sequence[Tensor], gains: Sequence[Tensor], mask_c: Tensor | None,
        zoneout_c: float, save: bool, product_dtype: int = -1, **others: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        *results, saved, _ = fake(kind, x=x, weights=weights, save=save, product_dtype=product_dtype, **others)
        if save:
            hidden, changes_c = weights[1].shape[0] // kind.gates, mask_c is not None or zoneout_c != 0
            dtype = dtype_of(product_dtype, x)
            size = record_size(kind, hidden, bool(gains), changes_c, dtype, x.device)
            saved = saved.new_empty((*saved.shape[:-1], size))
        return (*results, saved)

    def of_backward(kind: Kind, gains: Sequence[Tensor], need_weights: bool, **others: Any) -> list[Tensor]:
        grads = backward_fake(kind, need_weights=need_weights, gate_grads=False, **others)
        return [*grads, *(gain.new_empty(gain.shape if need_weights else (0,)) for gain in gains)]

    for mode in MODES:
        register_fake(f"{mode}_variant", partial(of_forward, KINDS[mode]))
        register_fake(f"{mode}_variant_backward", partial(of_backward, KINDS[mode]))
    register_formulas({f"{mode}_variant": flops.sequence for mode in MODES})
    register_formulas({f"{mode}_variant_backward": flops.sequence_backward for mode in MODES})


_operators: dict[str, Any] = {}
_backward_operators: dict[str, Any] = {}
if extension.HAVE_NATIVE:
    _operators = {mode: getattr(torch.ops.dlkernels, f"{mode}_variant").default for mode in MODES}
    _backward_operators = {mode: getattr(torch.ops.dlkernels, f"{mode}_variant_backward").default for mode in MODES}
