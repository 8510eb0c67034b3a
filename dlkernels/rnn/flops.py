"""The FLOP counts of the recurrent operators' matrix products, for torch's counter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dlkernels._core.flops import has_no_values

__all__ = ["cell", "cell_backward", "sequence", "sequence_backward"]


def _per_row(weights: Sequence[Tensor]) -> tuple[int, int]:
    """Multiply-adds per row of one direction: with the input, and with the state (its projection included)."""
    w_ih, w_hh = weights[0], weights[1]
    projection = weights[-1].numel() if len(weights) % 2 else 0
    return w_ih.numel(), w_hh.numel() + projection


def _rows(x: Tensor) -> int:
    """The number of rows: steps x sequences, or for packed input the rows of its data."""
    return x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]


def sequence(x: Tensor, weights: Sequence[Tensor], bidirectional: bool, **others: Any) -> int:
    directions = 2 if bidirectional else 1
    return 2 * _rows(x) * directions * sum(_per_row(weights[: len(weights) // directions]))


def sequence_backward(
    x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None, bidirectional: bool,
    batch_first: bool, need_x: bool, need_state: bool, need_weights: bool, **others: Any,
) -> int:  # fmt: skip
    directions = 2 if bidirectional else 1
    with_input, with_state = _per_row(weights[: len(weights) // directions])
    rows = _rows(x)
    products = rows * directions * (with_input * (need_x + need_weights) + with_state * (1 + need_weights))
    if not (need_state and h0 is not None):
        # The gradient of the initial state is not wanted, which saves one product in the first step.
        products -= weights[1].numel() * sum(_first_rows(x, batch_sizes, batch_first)[:directions])
    return 2 * products


def _first_rows(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[int, int]:
    """The number of sequences in the first step of the forward and of the reverse direction."""
    if batch_sizes is None:
        batch = x.shape[0 if batch_first else 1]
        return batch, batch
    if has_no_values(batch_sizes):
        return 0, 0
    return int(batch_sizes[0]), int(batch_sizes[-1])


def cell(x: Tensor, w_ih: Tensor, w_hh: Tensor, **others: Any) -> int:
    return 2 * x.shape[0] * (w_ih.numel() + w_hh.numel())


def cell_backward(
    x: Tensor, h: Tensor | None, w_ih: Tensor, w_hh: Tensor, need_x: bool, need_state: bool, need_weights: bool,
    **others: Any,
) -> int:  # fmt: skip
    of_state = need_state and h is not None
    return 2 * x.shape[0] * (w_ih.numel() * (need_x + need_weights) + w_hh.numel() * (of_state + need_weights))
