"""An oracle for attention in a few lines of PyTorch, which shares no code with the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def philox_words(seed: int, counters: tuple[Tensor, Tensor, Tensor, int]) -> list[Tensor]:
    """The four words of Philox4x32-10 for each counter, computed in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) for c in counters))
    k0, k1 = seed & low, (seed >> 32) & low

    def product(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The high and the low word of a * x, from 16-bit halves of x, since the whole product does not fit int64."""
        part = a * (x & 0xFFFF)
        rest = a * (x >> 16) + (part >> 16)
        return rest >> 16, ((rest & 0xFFFF) << 16) | (part & 0xFFFF)

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def keep_mask(rng: Tensor, p: float, B: int, H: int, M: int, N: int, first: int = 0) -> Tensor:
    """Which elements dropout keeps, [B, H, M, N]. `first` is the index of the first batch entry."""
    seed, offset = rng.tolist()
    head = (torch.arange(B)[:, None] + first) * H + torch.arange(H)
    j = torch.arange(N)
    words = philox_words(seed, (j // 4, torch.arange(M)[:, None], head[:, :, None, None], offset & 0xFFFFFFFF))
    word = torch.stack(words, -1).gather(-1, (j % 4).expand(B, H, M, N)[..., None])[..., 0]
    return word >= min(int(p * 2**32), 2**32)


class Piece(NamedTuple):
    """Intermediate results for one sequence of packed input or for the whole padded input, [B, H, ...]. v is repeated
    for each query head."""

    scores: Tensor
    p: Tensor
    v: Tensor
    keep: Tensor
    lse: Tensor
    rows: slice | None

    def of_rows(self, x: Tensor, has_width: bool) -> Tensor:
        """The part of `x` that belongs to this piece, where `x` has the layout of o or of the log-sum-exp."""
        if self.rows is None:
            return x
        return x[self.rows].transpose(0, 1)[None] if has_width else x[None, :, self.rows]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None, softmax_scale: float, causal: int,
    window_left: int, window_right: int, softcap: float, dropout_p: float,
) -> tuple[Tensor, Tensor, list[Piece]]:  # fmt: skip
    settings = (softmax_scale, causal, window_left, window_right, softcap)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        o, piece = _padded(q, k, v, mask, alibi_slopes, sinks, *settings, rng, dropout_p, 0, None)
        return o, piece.lse, [piece]
    outputs, pieces = [], []
    for b in range(cu_seqlens_q.numel() - 1):
        rows, cols = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        parts = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, cols), (v, cols)))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b : b + 1]
        o, piece = _padded(*parts, None, slopes, sinks, *settings, rng, dropout_p, b, rows)
        outputs.append(o[0].transpose(0, 1))
        pieces.append(piece)
    return torch.cat(outputs), torch.cat([piece.lse[0] for piece in pieces], 1), pieces


def probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, softmax_scale: float,
    causal: int, window_left: int, window_right: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(scores, p, lse)"""
    B, H, M = q.shape[:3]
    N, group = k.size(2), H // k.size(1)
    s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * softmax_scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(M)[:, None] + (N - M if causal == 2 else 0) - torch.arange(N)  # p - j
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()
    seen = torch.ones(M, N, dtype=torch.bool)
    if causal:
        seen = seen & (distance >= 0)
    if window_left >= 0:
        seen = seen & (distance <= window_left)
    if window_right >= 0:
        seen = seen & (-distance <= window_right)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != float("-inf"))
        if mask.dtype != torch.bool:
            s = s + torch.where(mask == float("-inf"), 0.0, mask)
    s = torch.where(seen, s, float("-inf"))
    extra = torch.full((B, H, M, 1), float("-inf"), dtype=s.dtype)
    if sinks is not None:
        extra = sinks.to(s.dtype)[:, None, None].expand(B, H, M, 1)
    full = torch.cat([s, extra], -1)
    nothing = (full == float("-inf")).all(-1, keepdim=True)
    full = full.masked_fill(nothing, 0.0)
    p = torch.softmax(full, -1).masked_fill(nothing, 0.0)[..., :N]
    lse = torch.logsumexp(full, -1).masked_fill(nothing[..., 0], float("-inf"))
    return s, p.masked_fill(~seen, 0.0), lse


def _padded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    softmax_scale: float, causal: int, window_left: int, window_right: int, softcap: float, rng: Tensor | None,
    dropout_p: float, first: int, rows: slice | None,
) -> tuple[Tensor, Piece]:  # fmt: skip
    B, H, M = q.shape[:3]
    s, p, lse = probabilities(
        q, k, mask, alibi_slopes, sinks, softmax_scale, causal, window_left, window_right, softcap
    )
    keep = torch.ones((), dtype=q.dtype)
    if dropout_p > 0:
        assert rng is not None
        keep = keep_mask(rng, dropout_p, B, H, M, k.size(2), first).to(q.dtype) / (1 - dropout_p)
    v = v.repeat_interleave(H // k.size(1), 1)
    return p * keep @ v, Piece(s, p, v, keep, lse, rows)
