"""The recurrent operators `torch.ops.dlkernels.*`, by mode: "lstm", "gru", "rnn_tanh", "rnn_relu".

They check and compute, no more: no autograd, no broadcasting, no promotion, no mutation. What is not there or not
wanted comes back as a tensor of shape [0].

All tensors of a call are of one dtype, unless it has a `Types`, which autocast asks for: then each may be float32,
bfloat16 or float16 (the weights of one dtype), products may be rounded to `Types.product` and sums are float32.
Gradients come in the dtypes of what they are of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.private_torch import without_python
from dlkernels.rnn.dtypes import SAME, Types

__all__ = [
    "MODES",
    "cell_backward",
    "cell_forward",
    "eager_cell",
    "pack",
    "sequence_backward",
    "sequence_forward",
]

MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu")

if extension.HAVE_NATIVE:
    from dlkernels.rnn import fakes, flops

    fakes.register(MODES)
    flops.register(MODES)


# Fetched once: a lookup through torch.ops costs as much as a good part of a short call.
def _overloads(suffix: str) -> dict[str, Callable[..., Any]]:
    if not extension.HAVE_NATIVE:
        return {}
    return {mode: getattr(torch.ops.dlkernels, mode + suffix).default for mode in MODES}


_forward = _overloads("")
_backward = _overloads("_backward")
_cell = _overloads("_cell")
_cell_backward = _overloads("_cell_backward")

# The same operators without the Python around an overload, about a microsecond of a cell's ten; not for tracing.
eager_cell: dict[str, Callable[..., list[Tensor]]] = {mode: without_python(cell) for mode, cell in _cell.items()}


def sequence_forward(
    mode: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], packed: Tensor | None,
    batch_sizes: Tensor | None, lengths: Tensor | None, bidirectional: bool, batch_first: bool, save: bool,
    deterministic: bool, types: Types = SAME,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer -> (y, h_n, c_n, saved).

    x: [T, B, I], or [B, T, I] if `batch_first`, or packed [rows, I] with `batch_sizes`, int64 [T]. h0: [D, B, O],
    c0: [D, B, H]; None is zeros. `weights`, per direction: w_ih, w_hh[, b_ih, b_hh][, w_hr]. `packed`: `pack(...)` of
    them. `lengths`: int64 [B] within 0..T. y lies in memory with time first, as torch's does. `save` keeps what the
    backward needs: [D, rows, `records.size`] in float32 (float64 for float64), rows being [T, B] for padded input
    whatever `batch_first` says; padding rows of it are not defined. A record holds S slots (lstm i, f, g, o, c'; gru
    r, z, n, the hidden half of n, h'; rnn h'), and with a projection h' behind them. `records` reads them: on the CPU
    some slots are narrow in a call of a 16-bit type.
    """
    return _forward[mode](  # type: ignore[no-any-return]
        x, h0, c0, weights, packed, batch_sizes, lengths, bidirectional, batch_first, save, deterministic, *types
    )


def sequence_backward(
    mode: str, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, x: Tensor, h0: Tensor | None,
    c0: Tensor | None, weights: Sequence[Tensor], saved: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None,
    bidirectional: bool, batch_first: bool, bptt_steps: int, deterministic: bool, need_x: bool, need_state: bool,
    need_weights: bool, gate_grads: bool, types: Types = SAME,
) -> list[Tensor]:  # fmt: skip
    """[dx, dh0, dc0, *dweights], and [dgates, dproj] after them if `gate_grads`.

    `bptt_steps` = k > 0 computes the gradients as if the state had been detached before every k-th step of a sequence.
    dgates: [D, rows, S', H], lstm i, f, g, o; gru r, z, input half and hidden half of n; rnn the one.
    dproj: [D, rows, P].
    """
    return _backward[mode](  # type: ignore[no-any-return]
        dy, dh_n, dc_n, x, h0, c0, weights, saved, batch_sizes, lengths, bidirectional, batch_first, bptt_steps,
        deterministic, need_x, need_state, need_weights, gate_grads, types.product,
    )  # fmt: skip


def cell_forward(
    mode: str, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, save: bool, deterministic: bool, types: Types = SAME,
) -> list[Tensor]:  # fmt: skip
    """One step, x [B, I], h and c [B, H] -> [h'], with c' after it for the lstm and `saved` [B, S*H] if `save`."""
    return _cell[mode](x, h, c, w_ih, w_hh, b_ih, b_hh, save, deterministic, *types)  # type: ignore[no-any-return]


def cell_backward(
    mode: str, dh: Tensor | None, dc: Tensor | None, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, saved: Tensor, deterministic: bool, need_x: bool,
    need_state: bool, need_weights: bool, gate_grads: bool, types: Types = SAME,
) -> list[Tensor]:  # fmt: skip
    """[dx, dh, dc, dw_ih, dw_hh, db_ih, db_hh], and dgates [B, S', H] after them if `gate_grads`."""
    return _cell_backward[mode](  # type: ignore[no-any-return]
        dh, dc, x, h, c, w_ih, w_hh, b_ih, b_hh, saved, deterministic, need_x, need_state, need_weights, gate_grads,
        types.product,
    )  # fmt: skip


def pack(mode: str, weights: Sequence[Tensor], bidirectional: bool) -> Tensor:
    """The weights as the kernels of the instruction set in force like them: opaque bytes, stale once weights change."""
    return torch.ops.dlkernels.pack.default(mode, weights, bidirectional)  # type: ignore[no-any-return]
