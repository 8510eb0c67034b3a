"""What the attention operators return, without the numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels._core.devices import register_fake
from dlkernels._core.dtypes import compute_dtype


def register() -> None:
    for name, fake in (("attention", _attention), ("attention_backward", _backward), ("attention_map", _map)):
        register_fake(name, fake)


def _heads_like(x: Tensor, width: Any) -> Tensor:
    """As wide as `width`; padded ones in memory as [B, rows, heads, width]."""
    if x.dim() == 3:
        return x.new_empty((*x.shape[:2], width))
    B, heads, rows = x.shape[:3]
    return x.new_empty((B, rows, heads, width)).transpose(1, 2)


def _attention(q: Tensor, v: Tensor, contiguous: bool, **others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, rows = compute_dtype(q.dtype), (q.shape[0] if q.dim() == 3 else q.shape[2])
    heads = (q.shape[1],) if q.dim() == 3 else q.shape[:2]
    o = _result(q, v.shape[-1], contiguous)
    return o, q.new_empty((*heads, rows), dtype=dtype), q.new_empty((*heads, 2, rows), dtype=dtype)


def _result(q: Tensor, width: Any, contiguous: bool) -> Tensor:
    if q.dim() == 4 and not contiguous and q.shape[-1] == width and q.stride(-1) == 1:
        o = torch.empty_like(q)
        if o.stride(-1) == 1 or width == 1:
            return o
    return q.new_empty((*q.shape[:-1], width))


def _backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    need_q: bool, need_kv: bool, need_mask: bool, need_slopes: bool, need_sinks: bool, **others: Any,
) -> list[Tensor]:  # fmt: skip
    grads = [_heads_like(x, x.shape[-1]) if need else None for x, need in ((q, need_q), (k, need_kv), (v, need_kv))]
    for x, need in ((mask, need_mask), (alibi_slopes, need_slopes), (sinks, need_sinks)):
        grads.append(x.new_empty(x.shape) if need and x is not None else None)
    return [q.new_empty((0,)) if grad is None else grad for grad in grads]


def _map(q: Tensor, rows: int, cols: int, **others: Any) -> Tensor:
    return q.new_empty((*q.shape[:2], rows, cols), dtype=compute_dtype(q.dtype))
