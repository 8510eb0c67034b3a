"""Tests a mask together with cu_seqlens: each sequence sees the first rows and columns of its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dlkernels
from dlkernels.functional import attention
from dlkernels.testing import error

pytestmark = pytest.mark.usefixtures("native")

H, HKV, D, DV = 4, 2, 8, 6
LENGTHS_Q, LENGTHS_K = (3, 0, 5, 2), (4, 2, 5, 7)
B, M, N = len(LENGTHS_Q), max(LENGTHS_Q), max(LENGTHS_K)
ENDS_Q, ENDS_K = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (LENGTHS_Q, LENGTHS_K))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    rows = sum(LENGTHS_Q), sum(LENGTHS_K)
    made = draw(rows[0], H, D), draw(rows[1], HKV, D), draw(rows[1], HKV, DV)
    return [x.to(dtype).requires_grad_() for x in made]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: Any, slopes: Tensor | None) -> Tensor:
    """The same in plain PyTorch."""
    full = mask.expand(B, H, M, N)
    outputs = []
    for b in range(B):
        rows, keys = slice(ENDS_Q[b], ENDS_Q[b + 1]), slice(ENDS_K[b], ENDS_K[b + 1])
        m, n = LENGTHS_Q[b], LENGTHS_K[b]
        own_k, own_v = (x[keys].transpose(0, 1).repeat_interleave(H // HKV, 0) for x in (k, v))
        scores = q[rows].transpose(0, 1) @ own_k.mT / D**0.5
        shift = n - m if causal == "bottom_right" else 0
        i, j = torch.arange(m)[:, None] + shift, torch.arange(n)
        if slopes is not None:
            scores = scores - slopes.expand(B, H)[b][:, None, None] * (i - j).abs()
        own = full[b, :, :m, :n]
        scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
        if causal:
            scores = scores.masked_fill(j > i, -torch.inf)
        outputs.append((torch.softmax(scores, -1).nan_to_num(0.0) @ own_v).transpose(0, 1))
    return torch.cat(outputs)


MASKS: dict[str, Tensor] = {
    "full": draw(B, H, M, N), "shared": draw(M, N), "of keys": draw(B, 1, 1, N), "of rows": draw(1, H, M, 1),
    "boolean": draw(B, 1, M, N) > -0.5, "a hidden row": (torch.arange(M)[:, None] != 1).expand(1, 1, M, N),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name: str, causal: Any, dtype: torch.dtype) -> None:
    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = inputs(dtype)
        mask = MASKS[name] if MASKS[name].dtype == torch.bool else MASKS[name].to(dtype).requires_grad_()
        slopes = draw(B, H).abs().to(dtype) if causal == "bottom_right" else None
        leaves = [x for x in (q, k, v, mask) if x.requires_grad]
        o = function(q, k, v, mask, causal, slopes)
        return [o, *torch.autograd.grad((o * draw(*o.shape).to(dtype)).sum(), leaves)]

    def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: Any, slopes: Tensor | None) -> Tensor:
        o, lse = attention(
            q, k, v, attn_mask=mask, causal=causal, alibi_slopes=slopes, cu_seqlens_q=ENDS_Q, cu_seqlens_k=ENDS_K,
            return_lse=True,
        )  # fmt: skip
        assert lse.shape == (H, q.shape[0])
        return o

    expected = run(by_hand, torch.float64)
    theirs = run(by_hand, dtype)
    for mine, other, right in zip(run(ours, dtype), theirs, expected, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape
        assert error(mine, right) <= 3 * error(other, right) + 1e-12 + 1e-6 * (dtype == torch.float32)


def test_like_a_mask_that_hides_nothing() -> None:
    """With all other options, and rows that belong to no sequence."""
    q, k, v = inputs(torch.float32)
    q = torch.cat([q, q[:3]])
    options: dict[str, Any] = {
        "cu_seqlens_q": ENDS_Q, "cu_seqlens_k": ENDS_K.long(), "max_seqlen_q": M, "max_seqlen_k": N, "softcap": 3.0,
        "sinks": torch.randn(H), "window": (2, 1), "softmax_scale": 0.4, "return_lse": True,
    }  # fmt: skip
    for found, expected in zip(
        attention(q, k, v, attn_mask=torch.ones(M, N, dtype=torch.bool), **options),
        attention(q, k, v, **options),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_autocast() -> None:
    """A mask is cast as it is without cu_seqlens, and the results have autocast's dtype."""
    q, k, v = inputs(torch.float32)
    options: dict[str, Any] = {"cu_seqlens_q": ENDS_Q, "cu_seqlens_k": ENDS_K}
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            found = attention(q, k, v, attn_mask=torch.zeros(M, N, dtype=dtype), **options)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found, attention(q, k, v, **options), rtol=0.016, atol=0.01)


def test_nothing_and_mistakes() -> None:
    q, k, v = inputs(torch.float32)
    none = torch.zeros(1, dtype=torch.int32)
    o = attention(q[:0], k[:0], v[:0], attn_mask=torch.zeros(1, 1), cu_seqlens_q=none, cu_seqlens_k=none)
    assert o.shape == (0, H, DV)
    given = {"cu_seqlens_q": ENDS_Q, "cu_seqlens_k": ENDS_K}
    with pytest.raises(RuntimeError, match="attn_mask: expected a shape that broadcasts to"):
        attention(q, k, v, attn_mask=torch.zeros(M + 1, N), **given)
    with pytest.raises(RuntimeError, match="attn_mask: expected bool"):
        attention(q, k, v, attn_mask=torch.zeros(M, N, dtype=torch.int64), **given)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        attention(q, k, v, attn_mask=torch.zeros(M, N), cu_seqlens_q=ENDS_Q)
    explained = str(dlkernels.explain(attention, q, k, v, attn_mask=MASKS["full"].float(), **given))
    assert f"each of {B} sequences" in explained
