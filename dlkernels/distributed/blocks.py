"""Attention between one shard of queries and one of keys, and how the results of several shards of keys are joined.

Each block is a call of the attention operators, whose o and lse are those of the block's keys. With the denominators
l_i = exp(lse_i) of the softmax, the attention over all keys is sum(l_i o_i) / sum(l_i), as in the online softmax
(Milakov & Gimelshein 2018). The backward of a block recomputes its probabilities from the statistics of the softmax
over all keys, so that its gradients add up to those of the whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlkernels._core.dtypes import compute_dtype
from dlkernels._core.gradients import pullback
from dlkernels.attention import operators, reference
from dlkernels.attention.arguments import AttentionConfig, AttentionInputs, AttentionWanted

__all__ = ["Joined", "backward", "forward"]


def forward(native: bool, cfg: AttentionConfig, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse, stats) as the operator returns them. native: a kernel serves the call; otherwise PyTorch does."""
    if native:
        return operators.run_forward(AttentionInputs(q, k, v), cfg)
    o, lse = reference.attention(q, k, v, **cfg.keywords)
    # The probabilities are exp(score - top) * weight, with top = lse and weight = 1; those of a row that sees nothing
    # are 0.
    nothing = lse == -math.inf
    return o, lse, torch.stack((lse.masked_fill(nothing, math.inf), 1 - nothing.to(lse.dtype)), 2)


def backward(
    native: bool, cfg: AttentionConfig, do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    stats: Tensor, need_q: bool, need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of the keys of this block. o and stats are those over all keys; do and dlse are their gradients. A
    gradient that is not wanted may be empty."""
    if native:
        wanted = AttentionWanted(need_q, need_kv, False, False, False)
        dq, dk, dv, *_ = operators.run_backward(do, dlse, AttentionInputs(q, k, v), o, stats, cfg, wanted)
        return dq, dk, dv
    return _reference_backward(cfg, do, dlse, q, k, v, o, stats)


def _reference_backward(
    cfg: AttentionConfig, do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients through o = sum(share_i o_i) and lse = log(sum(exp(lse_i))), with share_i = exp(lse_i - lse)."""
    own_o, own_lse = reference.attention(q, k, v, **cfg.keywords)
    top, weight = stats.unbind(2)
    share = torch.exp(own_lse - top) * weight
    of_lse = (do.to(share.dtype) * (own_o.to(share.dtype) - o.to(share.dtype))).sum(-1)
    if dlse is not None:
        of_lse = of_lse + dlse
    cotangents = ((do * share[..., None]).to(do.dtype), of_lse * share)
    dq, dk, dv = pullback(lambda *given: reference.attention(*given, **cfg.keywords), (q, k, v), cotangents)
    assert dq is not None and dk is not None and dv is not None
    return dq, dk, dv


class Joined:
    """The results of blocks, joined row by row in the compute type: float64 for float64, float32 for other dtypes.

    `_largest` is the largest lse of a row so far, `_total` the sum of exp(lse_i - largest), and `_o` the sum of the o_i
    with the same weights. The statistics are those of the block with the largest lse. Every block has the same units
    of scores, because these depend on the dtype, the scale and the softcap alone.
    """

    def __init__(self, q: Tensor, width: int) -> None:
        shape, dtype = q.shape[:3], compute_dtype(q.dtype)
        if width == q.shape[-1]:
            self._o = torch.zeros_like(q, dtype=dtype)  # in the memory layout of q, as the operator returns o
        else:
            self._o = q.new_zeros((*shape, width), dtype=dtype)
        self._largest = q.new_full(shape, -math.inf, dtype=dtype)
        self._total = q.new_zeros(shape, dtype=dtype)
        self._top = q.new_full(shape, math.inf, dtype=dtype)
        self._weight = q.new_zeros(shape, dtype=dtype)
        self._dtype = q.dtype

    def add(self, rows: slice, o: Tensor, lse: Tensor, stats: Tensor) -> None:
        """Adds a block whose queries are these rows."""
        largest, total, out = self._largest[:, :, rows], self._total[:, :, rows], self._o[:, :, rows]
        above = ~(lse <= largest)  # also where one of them is NaN, which then reaches the gradients
        for into, value in zip((self._top, self._weight), stats.unbind(2), strict=True):
            into[:, :, rows].copy_(torch.where(above, value, into[:, :, rows]))
        after = torch.maximum(largest, lse)
        # -inf minus itself would be NaN in rows that have seen nothing.
        base = after.masked_fill(after == -math.inf, 0.0)
        before, now = torch.exp(largest - base), torch.exp(lse - base)
        total.mul_(before).add_(now)
        out.mul_(before[..., None]).addcmul_(o.to(out.dtype), now[..., None])
        largest.copy_(after)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(o, lse, stats) over the keys of all blocks; o 0 and lse -inf in rows that have seen nothing."""
        divisor = self._total.masked_fill(self._total == 0, 1.0)
        o = (self._o / divisor[..., None]).to(self._dtype)
        return o, self._largest + torch.log(divisor), torch.stack((self._top, self._weight / divisor), 2)
