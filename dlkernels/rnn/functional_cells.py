"""One step of the recurrent layers as functions; `dlkernels.functional` exports them. dtypes, devices and errors are
those of `dlkernels.rnn.functional`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels.rnn import checks
from dlkernels.rnn.dtypes import SAME, recurrent_types
from dlkernels.rnn.functional import Pair, of_one_dtype
from dlkernels.rnn.kinds import KINDS, Kind, rnn_mode
from dlkernels.rnn.operators import by_torch
from dlkernels.rnn.operators.arguments import CellConfig, CellInputs, SequenceConfig, SequenceInputs
from dlkernels.rnn.operators.cell import cell
from dlkernels.rnn.operators.sequence import sequence
from dlkernels.rnn.routing import is_call_for_torch

__all__ = ["arrange_cell", "gru_cell", "lstm_cell", "rnn_cell"]


def lstm_cell(
    input: Tensor, hx: Pair | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, *, packed: Tensor | None = None,
) -> Pair:  # fmt: skip
    """One step of `lstm`: input [B, I] or [I], hx = (h, c) [B, H] or [H] each or None for zeros -> (h', c').
    `packed` is a buffer of `dlkernels.rnn.operators.pack`, made of these weights."""
    out = _cell(KINDS["lstm"], input, hx, w_ih, w_hh, b_ih, b_hh, packed)
    return out[0], out[1]


def gru_cell(
    input: Tensor, hx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, *, packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step of `gru`: input [B, I] or [I], hx [B, H] or [H] or None for zeros -> h'. `packed` as for `lstm_cell`."""
    return _cell(KINDS["gru"], input, hx, w_ih, w_hh, b_ih, b_hh, packed)[0]


def rnn_cell(
    input: Tensor, hx: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, *, nonlinearity: str = "tanh", packed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step of `rnn`: input [B, I] or [I], hx [B, H] or [H] or None for zeros -> h'. `packed` as for `lstm_cell`."""
    return _cell(KINDS[rnn_mode(nonlinearity)], input, hx, w_ih, w_hh, b_ih, b_hh, packed)[0]


def _cell(
    kind: Kind, x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    packed: Tensor | None,
) -> Sequence[Tensor]:  # fmt: skip
    function, name = f"{kind.function}_cell", f"{kind.layer}Cell"
    h, c = checks.states(kind, function, hx) if kind.has_cell_state else (hx, None)
    for argument, value in (("input", x), ("w_ih", w_ih), ("w_hh", w_hh)):
        checks.tensor(function, argument, value)
    for argument, optional in (("hx", h), ("b_ih", b_ih), ("b_hh", b_hh)):
        if optional is not None:
            checks.tensor(function, argument, optional)
    if x.dim() != 2:
        checks.cell_rank(name, x)
        h, c = (None if state is None else state.unsqueeze(0) for state in (h, c))
        states = h if not kind.has_cell_state or h is None else (h, c)
        out = _cell(kind, x.unsqueeze(0), states, w_ih, w_hh, b_ih, b_hh, packed)
        return [state.squeeze(0) for state in out[: 2 if kind.has_cell_state else 1]]
    cfg, given = arrange_cell(kind, x, h, c, w_ih, w_hh, b_ih, b_hh)
    if extension.prefers_torch and is_call_for_torch(cfg.mode, given.x):
        return by_torch.cell(cfg.mode, given)
    if packed is None or cfg.types != SAME:
        return cell(cfg, given)
    # Only layers have operators that take packed weights; a cell is a layer of one step.
    h, c = (None if state is None else state.unsqueeze(0) for state in (h, c))
    weights = (w_ih, w_hh) if given.b_ih is None or given.b_hh is None else (w_ih, w_hh, given.b_ih, given.b_hh)
    out = sequence(
        SequenceConfig(kind.mode, deterministic=cfg.deterministic),
        SequenceInputs(x.unsqueeze(0), h, c, packed, None, None, weights),
    )
    return [state.squeeze(0) for state in out[1 : 3 if kind.has_cell_state else 2]]


def arrange_cell(
    kind: Kind, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[CellConfig, CellInputs]:  # fmt: skip
    """Checks one step of a batch and returns it as `operators.cell.cell` takes it."""
    if b_ih is None and b_hh is not None:
        b_ih = torch.zeros_like(b_hh)
    elif b_hh is None and b_ih is not None:
        b_hh = torch.zeros_like(b_ih)
    weights: Sequence[Tensor] = (w_ih, w_hh) if b_ih is None or b_hh is None else (w_ih, w_hh, b_ih, b_hh)
    types = recurrent_types(kind.mode, x, h, c, weights, layer=False)
    if types != SAME:
        weights = of_one_dtype(types, weights)
        w_ih, w_hh, *biases = weights
        b_ih, b_hh = biases or (None, None)
    checks.same_kind(x, (h, c), weights, RuntimeError, mixed=types != SAME)
    checks.cell(f"{kind.layer}Cell", x, h, c, w_ih, w_hh, kind.gates)
    if b_ih is not None:
        checks.cell_biases(b_ih, b_hh, w_ih.shape[0])
    cfg = CellConfig(kind.mode, torch.are_deterministic_algorithms_enabled(), types)
    return cfg, CellInputs(x, h, c, w_ih, w_hh, b_ih, b_hh)
