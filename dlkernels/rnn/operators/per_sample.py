"""Weight gradients for each sample that vmap folded into the batch, from the gradients of the gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlkernels._core.batching import unflatten
from dlkernels.rnn import records
from dlkernels.rnn.dtypes import dtype_of
from dlkernels.rnn.kinds import KINDS, DirectionWeights, Kind, split_directions
from dlkernels.rnn.operators.arguments import CellInputs, SequenceConfig, SequenceInputs
from dlkernels.rnn.reference import states_are_reset

__all__ = ["cell_weight_grads", "sequence_weight_grads", "unfold_groups"]


def unfold_groups(
    grads: Sequence[Tensor], inner_groups: int, n: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """As `unfold_all`, for weight gradients [n * inner groups, *shape]. inner_groups is 0 if no vmap is inside this
    one."""
    out_dims = tuple(None if grad.dim() == 1 else 0 for grad in grads)  # 1-D: a placeholder
    if inner_groups:
        grads = [grad if grad.dim() == 1 else unflatten(grad, 0, n, inner_groups) for grad in grads]
    return tuple(grads), out_dims


def _per_group(rows: Tensor, features: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """sum over t, b of rows[t, n, b, :]^T features[t, n, b, :] for [T, n*B, .] -> [n, rows, features]."""
    return torch.einsum(
        "tnbr,tnbf->nrf", _split_batch(rows, groups), _split_batch(features, groups).to(rows.dtype)
    ).to(dtype)  # fmt: skip


def _split_batch(tensor: Tensor, groups: int) -> Tensor:
    return unflatten(tensor, 1, groups, tensor.shape[1] // groups)


def _gate_halves(kind: Kind, dgates: Tensor) -> tuple[Tensor, Tensor]:
    """[..., S', H] -> the gradients of W_ih x + b_ih and of W_hh h + b_hh, [..., G*H] each."""
    if kind.of_input == kind.of_hidden:
        flat = dgates.flatten(-2)
        return flat, flat
    slots = dgates.unbind(-2)
    return torch.cat([slots[at] for at in kind.of_input], -1), torch.cat([slots[at] for at in kind.of_hidden], -1)


def _group_grads(
    w: DirectionWeights, d_ih: Tensor, d_hh: Tensor, x: Tensor, h_before: Tensor, groups: int
) -> list[Tensor]:
    grads = [_per_group(d_ih, x, groups, w.w_ih.dtype), _per_group(d_hh, h_before, groups, w.w_hh.dtype)]
    for bias, rows in ((w.b_ih, d_ih), (w.b_hh, d_hh)):
        if bias is not None:
            grads.append(_split_batch(rows, groups).sum((0, 2)).to(bias.dtype))
    return grads


def sequence_weight_grads(
    cfg: SequenceConfig, groups: int, given: SequenceInputs, saved: Tensor, dgates: Tensor, dproj: Tensor
) -> list[Tensor]:
    """Weight gradients [groups, *shape] of padded input whose batch is groups x B, from the gate gradients."""
    kind, product_dtype = KINDS[cfg.mode], dtype_of(cfg.types.product, given.x)
    x, h0, _, _, _, lengths, weights, resets = given
    if cfg.batch_first:
        x = x.transpose(0, 1)
    steps = torch.arange(x.shape[0], device=x.device)[:, None]
    if lengths is not None:
        # The values in the padding must not enter any sum.
        alive = (steps < lengths)[:, :, None]
        x, saved = torch.where(alive, x, 0), torch.where(alive, saved, 0)
    directions = split_directions(weights, dgates.shape[0])
    grads: list[Tensor] = []
    for d, w in enumerate(directions):
        record = records.slots(kind, saved[d], dgates.shape[-1], product_dtype)
        h = record[-1] if w.w_hr is not None else kind.hidden_of(record)
        first = torch.zeros_like(h[:1]) if h0 is None else h0[d : d + 1].to(h.dtype)
        if d == 0:
            h_before = torch.cat((first, h[:-1]))
        else:
            h_before = torch.cat((h[1:], first))
            if lengths is not None:
                h_before = torch.where((steps == lengths - 1)[:, :, None], first, h_before)
        if resets is not None:
            h_before = torch.where(states_are_reset(resets, lengths, d)[:, :, None], 0, h_before)
        grads += _group_grads(w, *_gate_halves(kind, dgates[d]), x, h_before, groups)
        if w.w_hr is not None:
            grads.append(_per_group(dproj[d], kind.hidden_of(record), groups, w.w_hr.dtype))
    return grads


def cell_weight_grads(mode: str, groups: int, given: CellInputs, dgates: Tensor) -> list[Tensor]:
    """As `sequence_weight_grads` for one step: [dw_ih, dw_hh, db_ih, db_hh], empty for an absent bias."""
    x, h, _, w_ih, w_hh, b_ih, b_hh = given
    d_ih, d_hh = _gate_halves(KINDS[mode], dgates[None])
    before = x.new_zeros(x.shape[0], w_hh.shape[1]) if h is None else h
    grads = _group_grads(DirectionWeights(w_ih, w_hh, b_ih, b_hh, None), d_ih, d_hh, x[None], before[None], groups)
    return grads if b_ih is not None else [*grads, x.new_empty(0), x.new_empty(0)]
