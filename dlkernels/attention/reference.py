"""softmax(Q K^T) V with all features of `dlkernels.functional.attention`, computed with M x N matrices.

Sizes: B sequences, H heads of queries, Hkv of keys and values, M queries, N keys. Padded tensors are [B, heads, rows,
width]; with cu_seqlens, sequences lie one after the other, [rows, heads, width], and M and N are the rows of all. No
value of cu_seqlens is read, so this can be traced: a mask restricts each query to the keys of its own sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlkernels._core.autocast import without_autocast
from dlkernels._core.dtypes import compute_dtype

_WORD = 0xFFFFFFFF
_NEVER = -math.inf


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    rng: Tensor | None = None, softmax_scale: float, causal: int = 0, window_left: int = -1, window_right: int = -1,
    softcap: float = 0.0, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse): o like q but as wide as v; lse [B, H, M] or [H, rows], natural, -inf for a query that sees nothing.

    mask: [B, H, M, N] with a size of 1 wherever it is broadcast; bool (True = may attend) or added to the scores.
    causal: 0 none, 1 top left, 2 bottom right. window_left, window_right: -1 unbounded. rng: int64 [2], the seed and
    the offset of the dropout mask.

    Keys that no query sees and queries that see no key may hold NaN.
    """
    packed = cu_seqlens_q is not None
    dtype = compute_dtype(q.dtype)
    places = _places(q, k, cu_seqlens_q, cu_seqlens_k, causal)
    if packed:
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    with without_autocast(q.device):
        weights, lse, sees = _softmax(
            q, k, places, mask, alibi_slopes, sinks, softmax_scale, causal, window_left, window_right, softcap
        )
        if dropout_p > 0:
            assert rng is not None
            kept = dropout_mask(rng, places.sequence, q.shape[1], places.query, places.key, dropout_p)
            weights = torch.where(kept, weights * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0.0)
        seen = sees.any(-2).unsqueeze(-1)
        v = _per_query_head(v.to(dtype), q.shape[1])
        o = weights @ torch.where(seen, v, 0.0)
        # No gradient may reach what is not seen either.
        o = torch.where(sees.any(-1, keepdim=True), o, 0.0).to(q.dtype)
    if packed:
        return o.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return o, lse


def attention_map(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, softmax_scale: float, causal: int = 0, window_left: int = -1, window_right: int = -1,
    softcap: float = 0.0, rows: int, cols: int,
) -> Tensor:  # fmt: skip
    """[B, H, rows, cols]: the probabilities of padded attention, summed over the keys of a column's bin (key j falls in
    bin j * cols // N) and averaged over the queries of a row's bin (i * rows // M). A bin without a query is 0."""
    M, N = q.shape[2], k.shape[2]
    with without_autocast(q.device):
        weights = _softmax(
            q, k, _places(q, k, None, None, causal), mask, alibi_slopes, sinks, softmax_scale, causal, window_left,
            window_right, softcap,
        )[0]  # fmt: skip
        by_row = _bins(M, rows, weights).transpose(0, 1)
        counts = by_row.sum(-1, keepdim=True).clamp(min=1)
        return (by_row / counts) @ weights @ _bins(N, cols, weights)


def dropout_mask(rng: Tensor, sequence: Tensor, heads: int, query: Tensor, key: Tensor, p: float) -> Tensor:
    """[B, H, M, N], True where a weight is kept: word j % 4 of Philox 4x32-10 (Salmon et al. 2011) with the counter
    (j / 4, i, sequence * heads + head, offset) and the seed for a key, against p."""
    head = sequence * heads + torch.arange(heads, device=query.device)[:, None, None]
    seed, offset = rng.to(query.device).unbind()
    word, *others = _philox(seed, (key // 4, query, head, offset & _WORD))
    for place, other in enumerate(others, 1):
        word = torch.where(key % 4 == place, other, word)
    return word >= math.floor(p * 2**32)


class _Places(NamedTuple):
    """The places of queries and keys: `sequence` broadcasts with [B, H, M, 1], the others with [M, 1] or [N]."""

    sequence: Tensor  # of a query
    query: Tensor  # index within its sequence
    position: Tensor  # of a query, on the keys' scale
    key: Tensor  # index within its sequence
    same: Tensor | None = None  # [M, N]: query and key belong to one sequence
    covered: Tensor | None = None  # [M, 1]: a query belongs to some sequence


def _places(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, causal: int) -> _Places:
    if cu_q is None or cu_k is None:
        M, N = q.shape[2], k.shape[2]
        query, key = torch.arange(M, device=q.device)[:, None], torch.arange(N, device=q.device)
        sequence = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        return _Places(sequence, query, query + (N - M if causal == 2 else 0), key)
    cu_q, cu_k = cu_q.to(torch.int64), cu_k.to(torch.int64)
    of_query, query, rows = _within(cu_q, q.shape[0])
    of_key, key, keys = _within(cu_k, k.shape[0])
    of_query, query = of_query[:, None], query[:, None]
    shift = (keys - rows)[of_query] if causal == 2 else 0
    covered = of_query < cu_q.shape[0] - 1
    return _Places(of_query, query, query + shift, key, (of_query == of_key) & covered, covered)


def _within(cu: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `total` rows its sequence and its index there, and the length of each sequence. Rows behind the last
    sequence belong to an additional one of length 0."""
    row = torch.arange(total, device=cu.device)
    sequence = (row[:, None] >= cu[1:]).sum(-1)
    lengths = torch.cat((cu[1:] - cu[:-1], cu.new_zeros(1)))
    return sequence, row - cu[sequence], lengths


def _softmax(
    q: Tensor, k: Tensor, places: _Places, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    scale: float, causal: int, left: int, right: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Probabilities [B, H, M, N], lse [B, H, M], and where a query sees a key, which broadcasts with the first."""
    dtype = compute_dtype(q.dtype)
    heads, position, key = q.shape[1], places.position, places.key
    distance = key - position
    sees = torch.ones_like(distance, dtype=torch.bool) if places.same is None else places.same
    if causal:
        sees = sees & (distance <= 0)
    if left >= 0:
        sees = sees & (distance >= -left)
    if right >= 0:
        sees = sees & (distance <= right)
    if mask is not None:
        sees = sees & (mask if mask.dtype == torch.bool else mask != _NEVER)

    q = torch.where(sees.any(-1, keepdim=True), q.to(dtype), 0.0)
    k = torch.where(sees.any(-2).unsqueeze(-1), _per_query_head(k.to(dtype), heads), 0.0)
    scores = (q * scale) @ k.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype)[..., None, None]
        if alibi_slopes.dim() == 2 and places.covered is not None:
            # Rows behind the last sequence see nothing, so their slope does not matter.
            own = places.sequence.squeeze(-1).clamp(max=alibi_slopes.shape[0] - 1)
            slopes = alibi_slopes.to(dtype)[own].transpose(0, 1)[..., None]
        scores = scores - slopes * distance.abs()
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + torch.where(sees, mask.to(dtype), 0.0)
    scores = torch.where(sees, scores, _NEVER)

    sink = None if sinks is None else within_range(sinks, dtype).to(dtype)[:, None, None]
    # The result does not depend on this number; the largest score keeps exp from overflowing.
    top = scores.detach().amax(-1, keepdim=True) if k.shape[2] else scores.new_full((*scores.shape[:-1], 1), _NEVER)
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == _NEVER, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    if places.covered is not None:
        empty = empty | ~places.covered
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, _NEVER, torch.log(total) + top).squeeze(-1)
    return weights / total, lse, sees


def within_range(sinks: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamps the finite sinks of a wider dtype to the finite range of `dtype`; the gradient ignores the clamp."""
    if torch.finfo(sinks.dtype).max <= torch.finfo(dtype).max:
        return sinks
    limit = torch.finfo(dtype).max
    beyond = (sinks.abs() > limit) & sinks.isfinite()
    return torch.where(beyond, sinks.detach().clamp(-limit, limit) + (sinks - sinks.detach()), sinks)


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, N, .] -> [B, heads, N, .]"""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _bins(size: int, bins: int, like: Tensor) -> Tensor:
    """[size, bins], 1 where an index falls in a bin."""
    index = torch.arange(size, device=like.device)[:, None] * bins // max(size, 1)
    return (index == torch.arange(bins, device=like.device)).to(like.dtype)


def _philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    key = [seed & _WORD, (seed >> 32) & _WORD]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a * b for words a and b, whose unsigned 64-bit product int64 cannot hold."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
