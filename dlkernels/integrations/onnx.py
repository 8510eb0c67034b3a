"""What our operators are in ONNX: LSTM, GRU and RNN for the layers, elementary operators for cells and attention.

`torch.onnx.export(dynamo=True)` replaces an operator that it cannot translate by what a table says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels._core import extension
from dlkernels._core.private_torch import add_to_onnx_export
from dlkernels.attention import reference as attention_reference
from dlkernels.rnn import reference
from dlkernels.rnn.dtypes import dtype_of
from dlkernels.rnn.kinds import KINDS, Kind, sizes, split_directions

__all__ = ["register"]

# ONNX's gates in the numbers of torch's: i, o, f, g of i, f, g, o and z, r, n of r, z, n.
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
_OPSET = 14  # the oldest of LSTM, GRU and RNN with these arguments


def register() -> None:
    """Tells torch.onnx.export what our operators consist of. Nothing is compiled."""
    add_to_onnx_export(_decompositions())


def _decompositions() -> dict[Any, Callable[..., Any]]:
    operators = torch.ops.dlkernels
    found: dict[Any, Callable[..., Any]] = {operators.private_copy.default: torch.clone}
    if extension.HAVE_NATIVE:
        found[operators.attention.default] = _attention
        for mode, kind in KINDS.items():
            found[getattr(operators, mode).default] = _layer(kind)
            found[getattr(operators, f"{mode}_cell").default] = _cell(kind)
    return found


def _reordered(weight: Tensor, order: Sequence[int]) -> Tensor:
    gates = weight.chunk(len(order), 0)
    return torch.cat([gates[gate] for gate in order], 0)


def _layer(kind: Kind) -> Any:
    def layer(
        x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], packed: Tensor | None,
        batch_sizes: Tensor | None, lengths: Tensor | None, bidirectional: bool, batch_first: bool, save: bool,
        deterministic: bool, product_dtype: int = -1, h_dtype: int = -1, c_dtype: int = -1,
        resets: Tensor | None = None, cells: bool = False,
    ) -> Any:  # fmt: skip
        directions = 2 if bidirectional else 1
        hidden, proj, _ = sizes(kind, weights, directions)
        if batch_sizes is not None or product_dtype != -1:
            return NotImplemented
        nothing = x.new_empty((0,))
        if proj or x.dtype == torch.bfloat16 or resets is not None or cells:  # which ONNX's LSTM has not
            y, h_n, c_n, *all_c = reference.sequence(
                kind.mode, x, h0, c0, weights, batch_sizes, lengths, bidirectional, batch_first, 0,
                h_dtype=dtype_of(h_dtype, x), c_dtype=dtype_of(c_dtype, x), resets=resets, return_cells=cells,
            )  # fmt: skip
            return y, h_n, c_n, nothing, *(all_c or [nothing])
        steps = x.transpose(0, 1) if batch_first else x
        T, B = steps.shape[0], steps.shape[1]
        order = _ORDER[kind.mode]
        each = split_directions(weights, directions)
        w = torch.stack([_reordered(one.w_ih, order) for one in each])
        r = torch.stack([_reordered(one.w_hh, order) for one in each])
        b = None
        if each[0].b_ih is not None:
            b = torch.stack([
                torch.cat([_reordered(one.b_ih, order), _reordered(one.b_hh, order)])  # type: ignore[arg-type]
                for one in each
            ])  # fmt: skip
        states = [torch.zeros_like(x[:1, :1, :1]).expand(directions, B, hidden) if h0 is None else h0]
        if kind.has_cell_state:
            states.append(states[0] if c0 is None else c0)
        attributes: dict[str, Any] = {
            "hidden_size": int(hidden),
            "direction": "bidirectional" if bidirectional else "forward",
        }
        if kind.mode == "gru":
            attributes["linear_before_reset"] = 1
        elif kind.mode == "rnn_relu":
            attributes["activations"] = ["Relu"] * directions
        shapes: list[Any] = [(T, directions, B, hidden)] + [(directions, B, hidden)] * len(states)
        y, *last = torch.onnx.ops.symbolic_multi_out(
            {"lstm": "LSTM", "gru": "GRU"}.get(kind.mode, "RNN"),
            (steps, w, r, b, None if lengths is None else lengths.to(torch.int32), *states),
            attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes, version=_OPSET,
        )  # fmt: skip
        y = y.transpose(1, 2).flatten(2)
        if batch_first:
            y = y.transpose(0, 1)
        return y, last[0], last[1] if kind.has_cell_state else nothing, nothing, nothing

    return layer


def _cell(kind: Kind) -> Any:
    def cell(
        x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, save: bool, deterministic: bool, product_dtype: int = -1, h_dtype: int = -1,
        c_dtype: int = -1,
    ) -> Any:  # fmt: skip
        if product_dtype != -1:
            return NotImplemented
        new_h, new_c = reference.cell(
            kind.mode, x, h, c, w_ih, w_hh, b_ih, b_hh, h_dtype=dtype_of(h_dtype, x), c_dtype=dtype_of(c_dtype, x)
        )
        return [new_h, *([] if new_c is None else [new_c]), *([x.new_empty((0,))] if save else [])]

    return cell


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, causal: int, window_left: int, window_right: int, softcap: float,
    dropout_p: float, contiguous: bool,
) -> Any:  # fmt: skip
    if cu_seqlens_q is not None or dropout_p:
        return NotImplemented
    o, lse = attention_reference.attention(
        q,
        k,
        v,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
    )
    return o, lse, q.new_empty((0,))
