"""Whole sequences: one layer of one or two directions, and stacks of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from dlkernels._core.autocast import without_autocast
from dlkernels._core.dtypes import compute_dtype
from dlkernels.rnn.kinds import DirectionWeights, kind_of, split_directions
from dlkernels.rnn.reference.cells import step
from dlkernels.rnn.reference.variants import OneDirection, Variant

# A function of (h, c) that is called at each cut of truncated back-propagation through time, in a fixed order.
Cut = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def detach(h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return h.detach(), None if c is None else c.detach()


def sequence(
    mode: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None, lengths: Tensor | None = None, bidirectional: bool = False,
    batch_first: bool = False, bptt_steps: int = 0, cut: Cut = detach, h_dtype: torch.dtype | None = None,
    c_dtype: torch.dtype | None = None, resets: Tensor | None = None, return_cells: bool = False,
    variant: Variant | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One layer over x [T, B, I] ([B, T, I] if `batch_first`, packed data [rows, I] with `batch_sizes` [T]).

    h0 [D, B, O] and c0 [D, B, H], None for zeros. `lengths` [B] of 0..T: y is 0 after a sequence's end, the states are
    its last ones and the reverse direction starts at its end. Every `bptt_steps` steps (0: never) `cut` is applied to
    the state. Returns y (the layout of x, D*O features), h_n [D, B, O] and c_n [D, B, H], which is empty for gru and
    rnn. A projection is h' = W_hr h (Sak et al. 2014). The computation is in float32 or float64. h_dtype is the dtype
    of y and h_n, c_dtype that of c_n, None for that of x.

    `resets`: bool [T, B] even if `batch_first`, or [rows] of packed data. A flag at step t separates the steps before t
    from those from t on: the forward direction takes step t, and the reverse direction step t - 1, with a state of
    zeros. `return_cells` (lstm): c of every step is returned too, in the layout of y with D*H features. `variant` has
    layer normalisation, zoneout and recurrent dropout.
    """
    if batch_sizes is not None:
        present = torch.arange(int(batch_sizes[0])) < batch_sizes[:, None]  # [T, B]
        row = (present.flatten().cumsum(0) - 1).view_as(present).to(x.device)
        present = present.to(x.device)
        y, last_h, last_c, *cells = sequence(
            mode, x[row], h0, c0, weights, None, present.sum(0), bidirectional, False, bptt_steps, cut, h_dtype,
            c_dtype, None if resets is None else resets[row], return_cells,
            None if variant is None else variant.padded(row),
        )  # fmt: skip
        return y[present], last_h, last_c, *(each[present] for each in cells)

    kind, dtype = kind_of(mode), compute_dtype(x.dtype)
    xs = (x.transpose(0, 1) if batch_first else x).to(dtype)
    batch = xs.shape[1]
    ys: list[Tensor] = []
    cs: list[Tensor] = []
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    with without_autocast(x.device):
        for d, w in enumerate(split_directions(weights, 1 + bidirectional)):
            w = DirectionWeights(*(None if t is None else t.to(dtype) for t in w))  # type: ignore[arg-type]
            h = xs.new_zeros(batch, w.w_hh.shape[1]) if h0 is None else h0[d].to(dtype)
            c = None
            if kind.has_cell_state:
                hidden = w.w_hh.shape[0] // kind.gates
                c = xs.new_zeros(batch, hidden) if c0 is None else c0[d].to(dtype)
            reset = varied = None
            if resets is not None:
                reset = _in_order(states_are_reset(resets, lengths, d)[:, :, None], lengths, d)
            if variant is not None:
                varied = variant.direction(d, dtype, partial(_in_order, lengths=lengths, direction=d))
            out, cells, h, c = _scan(mode, _in_order(xs, lengths, d), h, c, w, lengths, bptt_steps, cut, reset, varied)
            ys.append(_in_order(out, lengths, d))
            if return_cells:
                cs.append(_in_order(torch.stack(cells), lengths, d))
            h_n.append(h)
            c_n.append(xs.new_zeros(0) if c is None else c)
        y = torch.cat(ys, -1).to(h_dtype or x.dtype)
    y = y.transpose(0, 1) if batch_first else y
    last_c = torch.stack(c_n).to(c_dtype or x.dtype) if kind.has_cell_state else c_n[0].to(h_dtype or x.dtype)
    results = (y, torch.stack(h_n).to(h_dtype or x.dtype), last_c)
    if not return_cells:
        return results
    all_c = torch.cat(cs, -1).to(c_dtype or x.dtype)
    return *results, all_c.transpose(0, 1) if batch_first else all_c


def _scan(
    mode: str, x: Tensor, h: Tensor, c: Tensor | None, w: DirectionWeights, lengths: Tensor | None, bptt_steps: int,
    cut: Cut, reset: Tensor | None, varied: OneDirection | None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:  # fmt: skip
    """One direction, in its own order: x [T, B, I], reset [T, B, 1] -> y [T, B, O], c of each step (lstm), h, c."""
    if lengths is not None:  # values in the padding, NaN included, must affect neither the result nor a gradient
        present = (torch.arange(x.shape[0], device=x.device)[:, None] < lengths)[:, :, None]
        x = torch.where(present, x, 0)
    gi = linear(x, w.w_ih, w.b_ih) if varied is None else varied.input_gates(mode, x, w)
    ys, cells = [], []
    for s in range(x.shape[0]):
        if bptt_steps and s and s % bptt_steps == 0:
            before_h, before_c = h, c
            h, c = cut(h, c)
            if lengths is not None:  # sequences that have ended are not cut
                h = torch.where(present[s], h, before_h)
                c = None if c is None or before_c is None else torch.where(present[s], c, before_c)
        if reset is not None:
            h, c = torch.where(reset[s], 0, h), None if c is None else torch.where(reset[s], 0, c)
        if varied is None:
            new_h, new_c = step(mode, gi[s], linear(h, w.w_hh, w.b_hh), h, c)
        else:
            new_h, new_c = varied.step(mode, s, gi[s], h, c, w)
        if w.w_hr is not None:
            new_h = linear(new_h, w.w_hr)
        if lengths is None:
            h, c = new_h, new_c
            ys.append(h)
        else:
            h = torch.where(present[s], new_h, h)
            c = None if c is None or new_c is None else torch.where(present[s], new_c, c)
            ys.append(torch.where(present[s], new_h, 0))
        if new_c is not None:
            cells.append(new_c if lengths is None else torch.where(present[s], new_c, 0))
    return torch.stack(ys), cells, h, c


def states_are_reset(resets: Tensor, lengths: Tensor | None, direction: int) -> Tensor:
    """Whether the state of a direction is zero before each of its steps, bool [T, B], from the argument `resets`."""
    if lengths is not None:  # flags in the padding separate nothing
        resets = resets & (torch.arange(resets.shape[0], device=resets.device)[:, None] < lengths)
    if direction == 0:
        return resets
    return torch.cat((resets[1:], torch.zeros_like(resets[:1])))


def _in_order(x: Tensor, lengths: Tensor | None, direction: int) -> Tensor:
    """Converts [T, B, F] from time order to the order of the direction or back; the conversion is its own inverse."""
    if direction == 0:
        return x
    if lengths is None:
        return x.flip(0)
    s = torch.arange(x.shape[0], device=x.device)[:, None]
    source = torch.where(s < lengths, lengths - 1 - s, s)
    return x.gather(0, source[:, :, None].expand(-1, -1, x.shape[2]))


def stack(
    mode: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], num_layers: int = 1,
    batch_sizes: Tensor | None = None, lengths: Tensor | None = None, bidirectional: bool = False,
    batch_first: bool = False, bptt_steps: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`num_layers` layers without dropout; h0, c0, h_n, c_n [num_layers*D, B, .], weights flat as in torch."""
    count, directions = len(weights) // num_layers, 1 + bidirectional
    h_n, c_n = [], []
    for layer in range(num_layers):
        here = slice(layer * directions, (layer + 1) * directions)
        x, h, c = sequence(
            mode, x, None if h0 is None else h0[here], None if c0 is None else c0[here],
            weights[layer * count : (layer + 1) * count], batch_sizes, lengths, bidirectional, batch_first, bptt_steps,
        )  # fmt: skip
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n)
