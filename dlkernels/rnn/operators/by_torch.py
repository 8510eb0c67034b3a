"""torch's own recurrent operators, for calls that `rnn/routing.py` leaves to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels.rnn.kinds import KINDS
from dlkernels.rnn.operators.arguments import SequenceConfig, SequenceInputs
from dlkernels.rnn.routing import is_call_for_torch

__all__ = ["cell", "layers", "plain_cell"]

_LAYERS: dict[str, Callable[..., Any]] = {mode: getattr(torch, mode) for mode in KINDS}
_CELLS: dict[str, Callable[..., Any]] = {mode: getattr(torch, f"{mode}_cell") for mode in KINDS}


def layers(
    cfg: SequenceConfig, given: SequenceInputs, num_layers: int, dropout: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h_n, c_n) of all layers of a stack, of checked arguments; c_n is h_n where there is no cell state."""
    extension.announce_torch()
    x, h0, c0, _, batch_sizes, _, weights, _ = given
    kind, directions = KINDS[cfg.mode], 2 if cfg.bidirectional else 1
    if h0 is None:
        batch = x.shape[0 if cfg.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        rows, outputs = weights[1].shape
        h0 = x.new_zeros(num_layers * directions, batch, outputs)
        c0 = x.new_zeros(num_layers * directions, batch, rows // kind.gates)
    hx = (h0, c0) if kind.has_cell_state else h0
    has_biases = len(weights) // (num_layers * directions) >= 4
    options = (has_biases, num_layers, dropout, training, cfg.bidirectional)
    if batch_sizes is None:
        y, h_n, *c_n = _LAYERS[cfg.mode](x, hx, weights, *options, cfg.batch_first)
    else:
        y, h_n, *c_n = _LAYERS[cfg.mode](x, batch_sizes, hx, weights, *options)
    return y, h_n, c_n[0] if c_n else h_n


def cell(mode: str, given: Sequence[Any]) -> Sequence[Tensor]:
    """h', then c' for the lstm. `given` holds the fields of CellInputs."""
    extension.announce_torch()
    x, h, c, *weights = given
    if h is None:
        h = c = x.new_zeros(x.shape[0], weights[1].shape[1])
    if KINDS[mode].has_cell_state:
        return _CELLS[mode](x, (h, c), *weights)  # type: ignore[no-any-return]
    return (_CELLS[mode](x, h, *weights),)


def plain_cell(mode: str, given: Sequence[Any]) -> Sequence[Tensor] | None:
    """The same without checks, or None if the call is not one of a batch that is left to torch. `given` may have any
    types."""
    x, h, c, *_ = given
    if not all(isinstance(tensor, Tensor) and tensor.dim() == 2 for tensor in (x, h, c) if tensor is not None):
        return None
    return cell(mode, given) if is_call_for_torch(mode, x) else None
