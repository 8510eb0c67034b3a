"""The attention operators, `torch.ops.dlkernels.attention*`; on CPU tensors they are C++, on CUDA tensors Triton.

Common arguments: q [B, H, M, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], or with cu_seqlens (int32 [B + 1]) [rows, heads,
width] of sequences that lie one after the other. mask: bool (True = may attend) or added, [B, H, M, N] with a size of 1
wherever it is broadcast. alibi_slopes [H] or [B, H], sinks [H]. rng: int64 [2] on the CPU, seed and offset of the
dropout mask. causal: 0 none, 1 top left, 2 bottom right. window_left, window_right: -1 unbounded. softcap 0: none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels.attention import fakes, flops, triton

__all__ = ["attention", "attention_backward", "attention_map"]

triton.register()
fakes.register()
flops.register()

_forward: Callable[..., Any] = torch.ops.dlkernels.attention.default
_backward: Callable[..., Any] = torch.ops.dlkernels.attention_backward.default
_map: Callable[..., Any] = torch.ops.dlkernels.attention_map.default


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, causal: int, window_left: int, window_right: int, softcap: float, dropout_p: float,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, [B, H, M, Dv] or [rows, H, Dv]; lse, float32 (float64 for float64), [B, H, M] or [H, rows]; and stats, which
    the backward is to get, [B, H, 2, M] or [H, 2, rows] of lse's dtype.

    The strides of o are those of `torch.empty_like(q)`; contiguous ones where that is asked for, where Dv != D and
    where the last stride of q is not 1.
    """
    return _forward(  # type: ignore[no-any-return]
        q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rng, max_seqlen_q, max_seqlen_k, softmax_scale,
        causal, window_left, window_right, softcap, dropout_p, contiguous,
    )  # fmt: skip


def attention_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, mask: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    rng: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: int, window_left: int,
    window_right: int, softcap: float, dropout_p: float, need_q: bool, need_kv: bool, need_mask: bool,
    need_slopes: bool, need_sinks: bool,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dmask, dslopes, dsinks], of shape [0] where not wanted; dmask has the mask's own shape."""
    return _backward(  # type: ignore[no-any-return]
        do, dlse, q, k, v, o, stats, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rng, max_seqlen_q,
        max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap, dropout_p, need_q, need_kv, need_mask,
        need_slopes, need_sinks,
    )  # fmt: skip


def attention_map(
    q: Tensor, k: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, softmax_scale: float,
    causal: int, window_left: int, window_right: int, softcap: float, rows: int, cols: int,
) -> Tensor:  # fmt: skip
    """[B, H, rows, cols] in float32 (float64 for float64); see `dlkernels.reference.attention_map`."""
    return _map(  # type: ignore[no-any-return]
        q, k, mask, alibi_slopes, sinks, softmax_scale, causal, window_left, window_right, softcap, rows, cols
    )
