"""What the operators return, without the numbers: shapes, dtypes and devices, for tracing and the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.devices import register_fake
from dlkernels._core.dtypes import compute_dtype
from dlkernels.rnn import records
from dlkernels.rnn.dtypes import dtype_of

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_GATE_GRAD_SLOTS = {"lstm": 4, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}


def register(modes: Iterable[str]) -> None:
    for mode in modes:
        for suffix, make in (
            ("", _sequence),
            ("_backward", _sequence_backward),
            ("_cell", _cell),
            ("_cell_backward", _cell_backward),
        ):
            register_fake(f"{mode}{suffix}", make(mode))
    register_fake("pack", _pack)


def _sizes(mode: str, weights: Sequence[Tensor], directions: int) -> tuple[int, int, int]:
    """H, P and O."""
    per_direction = len(weights) // directions
    hidden = weights[1].shape[0] // _GATES[mode]
    proj = weights[per_direction - 1].shape[0] if per_direction % 2 else 0
    return hidden, proj, proj or hidden


def _batch(x: Tensor, states: Iterable[Tensor | None], batch_sizes: Tensor | None, batch_first: bool) -> int:
    if batch_sizes is None:
        return x.shape[0 if batch_first else 1]
    for state in states:
        if state is not None:
            return state.shape[1]
    # The first of the batch sizes: a value, which tracing does not have.
    return torch.library.get_ctx().new_dynamic_size()  # type: ignore[return-value]


def _rows(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[int, ...]:
    """The leading dimensions of what is kept per row: time-major even where x is not."""
    if batch_sizes is not None:
        return (x.shape[0],)
    return (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])


def _sequence(mode: str) -> Callable[..., Any]:
    def fake(
        x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], packed: Tensor | None,
        batch_sizes: Tensor | None, lengths: Tensor | None, bidirectional: bool, batch_first: bool, save: bool,
        deterministic: bool, product_dtype: int = -1, h_dtype: int = -1, c_dtype: int = -1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        directions = 2 if bidirectional else 1
        hidden, proj, out = _sizes(mode, weights, directions)
        batch = _batch(x, (h0, c0), batch_sizes, batch_first)
        record = records.size(mode, hidden, proj, dtype_of(product_dtype, x), x.device)
        rows = _rows(x, batch_sizes, batch_first)
        saved = (directions, *rows, record) if save else (0,)
        of_h, of_c = dtype_of(h_dtype, x), dtype_of(c_dtype, x)
        y = x.new_empty((*rows, directions * out), dtype=of_h)
        return (
            y.transpose(0, 1) if batch_first and batch_sizes is None else y,
            x.new_empty((directions, batch, out), dtype=of_h),
            x.new_empty((directions, batch, hidden), dtype=of_c) if mode == "lstm" else x.new_empty(0, dtype=of_h),
            x.new_empty(saved, dtype=compute_dtype(x.dtype)),
        )

    return fake


def _sequence_backward(mode: str) -> Callable[..., Any]:
    def fake(
        dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor, h0: Tensor | None, c0: Tensor | None,
        weights: Sequence[Tensor], saved: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None,
        bidirectional: bool, batch_first: bool, bptt_steps: int, deterministic: bool, need_x: bool, need_state: bool,
        need_weights: bool, gate_grads: bool, product_dtype: int = -1,
    ) -> list[Tensor]:  # fmt: skip
        directions = 2 if bidirectional else 1
        hidden, proj, out = _sizes(mode, weights, directions)
        dh0: tuple[int, ...] = (0,)
        dc0: tuple[int, ...] = (0,)
        if need_state:
            batch = _batch(x, (h0, c0, dh_n, dc_n), batch_sizes, batch_first)
            dh0 = (directions, batch, out)
            if mode == "lstm":
                dc0 = (directions, batch, hidden)
        rows = _rows(x, batch_sizes, batch_first)
        grads = [
            x.new_empty(x.shape if need_x else (0,)),
            (x if h0 is None else h0).new_empty(dh0),
            (x if c0 is None else c0).new_empty(dc0),
        ]
        grads += [weight.new_empty(weight.shape if need_weights else (0,)) for weight in weights]
        if gate_grads:
            dtype = compute_dtype(x.dtype)
            grads.append(x.new_empty((directions, *rows, _GATE_GRAD_SLOTS[mode], hidden), dtype=dtype))
            grads.append(x.new_empty((directions, *rows, proj) if proj else (0,), dtype=dtype))
        return grads

    return fake


def _cell(mode: str) -> Callable[..., Any]:
    def fake(
        x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, save: bool, deterministic: bool, product_dtype: int = -1, h_dtype: int = -1,
        c_dtype: int = -1,
    ) -> list[Tensor]:  # fmt: skip
        B, H = x.shape[0], w_hh.shape[1]
        results = [x.new_empty((B, H), dtype=dtype_of(h_dtype, x))]
        if mode == "lstm":
            results.append(x.new_empty((B, H), dtype=dtype_of(c_dtype, x)))
        if save:
            record = records.size(mode, H, 0, dtype_of(product_dtype, x), x.device)
            results.append(x.new_empty((B, record), dtype=compute_dtype(x.dtype)))
        return results

    return fake


def _cell_backward(mode: str) -> Callable[..., Any]:
    def fake(
        dh: Tensor | None, dc: Tensor | None, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None, b_hh: Tensor | None, saved: Tensor, deterministic: bool, need_x: bool, need_state: bool,
        need_weights: bool, gate_grads: bool, product_dtype: int = -1,
    ) -> list[Tensor]:  # fmt: skip
        state = (x.shape[0], w_hh.shape[1])
        grads = [
            x.new_empty(x.shape if need_x else (0,)),
            (x if h is None else h).new_empty(state if need_state else (0,)),
            (x if c is None else c).new_empty(state if need_state and mode == "lstm" else (0,)),
            *(w_ih.new_empty(w.shape if need_weights and w is not None else (0,)) for w in (w_ih, w_hh, b_ih, b_hh)),
        ]
        if gate_grads:
            slots = (x.shape[0], _GATE_GRAD_SLOTS[mode], w_hh.shape[1])
            grads.append(x.new_empty(slots, dtype=compute_dtype(x.dtype)))
        return grads

    return fake


def _pack(mode: str, weights: Sequence[Tensor], bidirectional: bool) -> Tensor:
    assert extension.native is not None
    directions = 2 if bidirectional else 1
    hidden, proj, _ = _sizes(mode, weights, directions)
    size = extension.native.packed_bytes(
        mode, weights[0].dtype, int(weights[0].shape[1]), int(hidden), int(proj), directions
    )
    return weights[0].new_empty((size,), dtype=torch.uint8)
