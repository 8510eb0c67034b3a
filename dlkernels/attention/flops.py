"""The matrix products of the attention operators, for torch's counter."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from dlkernels._core.flops import COUNTER, has_no_values

__all__ = ["attention", "attention_backward", "attention_map"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, **others: Any,
) -> int:  # fmt: skip
    shapes = _shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return sum(sys.modules[COUNTER].sdpa_flop_count(*of_each) for of_each in shapes)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, **others: Any,
) -> int:  # fmt: skip
    shapes = _shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    count = sys.modules[COUNTER].sdpa_backward_flop_count
    return sum(count((*of_q[:3], of_v[3]), of_q, of_k, of_v) for of_q, of_k, of_v in shapes)


def attention_map(q: Tensor, k: Tensor, **others: Any) -> int:
    return 2 * q.numel() * k.shape[2]


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int
) -> list[tuple[tuple[int, ...], ...]]:
    """[batch, heads, rows, width] of q, k and v; of packed ones for each sequence."""
    if cu_q is None or cu_k is None:
        return [(tuple(q.shape), tuple(k.shape), tuple(v.shape))]
    lengths = zip(_lengths(cu_q, max_q), _lengths(cu_k, max_k), strict=True)
    return [
        ((1, q.shape[1], m, q.shape[2]), (1, k.shape[1], n, k.shape[2]), (1, v.shape[1], n, v.shape[2]))
        for m, n in lengths
    ]


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Without values each sequence counts as one of the longest, as in torch's own formulas."""
    if has_no_values(cu_seqlens):
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()
