"""The operators `dlkernels::attention*` on CUDA: functions with the arguments of their schemas, which launch the Triton
kernels.

The memory that they allocate grows with M or N but not with M * N. The one exception is the gradient of a full mask,
which is as large as the mask.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkernels.attention.triton import addresses, heuristics
from dlkernels.attention.triton.heuristics import Tile, padded
from dlkernels.attention.triton.kernels import elements
from dlkernels.attention.triton.kernels.backward_key import backward_key
from dlkernels.attention.triton.kernels.backward_query import backward_query, preprocess
from dlkernels.attention.triton.kernels.forward import combine, forward
from dlkernels.attention.triton.kernels.map import attention_map as map_kernel
from dlkernels.attention.triton.kernels.mask_gradient import mask_gradient
from dlkernels.attention.triton.launch import Options, launch

__all__ = ["attention_backward", "attention_forward", "attention_map"]

LOG2E = math.log2(math.e)
_PREPROCESS_ROWS = 64
_COMBINE_ROWS = 16
_MAP_TILE = 32
_ALREADY = contextlib.nullcontext()
# The bits of the kernels' FEATURES as plain numbers, which Python compares faster.
SOFTCAP, ALIBI, BOOL_MASK, FLOAT_MASK, DROPOUT, SINKS, LEFT, RIGHT, VARLEN, BOTTOM_RIGHT, SIGNED_SCALE = (
    getattr(elements, name).value
    for name in (
        "SOFTCAP", "ALIBI", "BOOL_MASK", "FLOAT_MASK", "DROPOUT", "SINKS", "LEFT", "RIGHT", "VARLEN", "BOTTOM_RIGHT",
        "SIGNED_SCALE",
    )
)  # fmt: skip
BUSY = DROPOUT | FLOAT_MASK | SOFTCAP


class Call(NamedTuple):
    """The values that all kernels of one call share."""

    B: int
    H: int
    GROUP: int
    M: int  # of the longest sequence
    N: int
    D: int
    DV: int
    features: int
    left: int
    right: int
    softmax_scale: float
    scale: float
    cap: float
    seed: int
    offset: int
    threshold: int
    keep_scale: float
    half: bool
    mask_bytes: int  # the size of a mask's elements
    precision: str

    def tile(self, kernel: str, arch: str) -> Tile:
        width = max(padded(self.D), padded(self.DV))
        features = self.features
        return heuristics.tile(
            kernel, arch, self.half, width, bool(features & BUSY), self.mask_bytes, bool(features & DROPOUT)
        )

    def options(self, warps: int, stages: int) -> Options:
        """The launch options. Operations are not fused in float32, so that the scaled score is rounded before anything
        is subtracted from it. Otherwise p at its row's maximum would differ from 1 by the rounding error of the score,
        which would be the whole error of a saturated row."""
        return Options(warps, stages, self.half)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        return self.D, self.DV, padded(self.D), padded(self.DV)

    @property
    def elementwise(self) -> tuple[Any, ...]:
        return self.left, self.right, self.scale, self.cap

    @property
    def dropout(self) -> tuple[Any, ...]:
        return self.seed, self.offset, self.threshold


def _describe(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, rng: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float,
    causal: int, window_left: int, window_right: int, softcap: float, dropout_p: float,
) -> Call:  # fmt: skip
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NotImplementedError(f"dlkernels: no CUDA attention kernel for {q.dtype}")
    D, DV = q.size(-1), v.size(-1)
    if max(D, DV) > 256:
        raise NotImplementedError(f"dlkernels: the CUDA attention kernel takes head sizes up to 256, got {max(D, DV)}")
    if cu_seqlens_q is None:
        (B, H, M), (HKV, N) = q.shape[:3], k.shape[1:3]
        reach = M + N
    else:
        B, H, HKV, M, N = cu_seqlens_q.numel() - 1, q.size(1), k.size(1), max_seqlen_q, max_seqlen_k
        reach = q.size(0) + k.size(0)
    # No query and key are `reach` positions apart, so a window edge that far away bounds nothing. With smaller edges
    # all positions fit 32 bits.
    left = window_left if 0 <= window_left < reach else -1
    right = window_right if 0 <= window_right < reach else -1
    if causal:
        right = 0
    features = VARLEN if cu_seqlens_q is not None else 0
    mask_bytes = 0
    if mask is not None:
        mask_bytes = mask.element_size()
        features |= FLOAT_MASK if mask.is_floating_point() else BOOL_MASK
    if alibi_slopes is not None:
        features |= ALIBI
    if sinks is not None:
        features |= SINKS
    if softcap > 0:
        features |= SOFTCAP
    if left >= 0:
        features |= LEFT
    if right >= 0:
        features |= RIGHT
    if causal == 2:
        features |= BOTTOM_RIGHT
    if dropout_p > 0:
        features |= DROPOUT
    if softmax_scale < 0:
        features |= SIGNED_SCALE
    seed = offset = threshold = 0
    if dropout_p > 0:
        assert rng is not None
        seed, offset = rng.tolist()
        threshold = min(math.floor(dropout_p * 2**32), 2**32 - 1)
    half = q.dtype != torch.float32
    unit = LOG2E if half else 1.0  # as elements.unit
    return Call(
        B, H, max(H // max(HKV, 1), 1), M, N, D, DV, features, max(left, 0), max(right, 0), softmax_scale,
        softmax_scale / softcap if softcap > 0 else softmax_scale * unit, softcap * unit, seed,
        offset & 0xFFFFFFFF, threshold, 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0, half,
        mask_bytes, _precision(q.dtype),
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """float32 products are float32 unless the user let torch use tf32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _machine(q: Tensor) -> tuple[str, int]:
    """The family in the tables and the number of multiprocessors. A CPU tensor means Triton's interpreter."""
    return _gpu(q.get_device()) if q.is_cuda else ("sm_80", 1)


@functools.cache
def _gpu(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return heuristics.family((properties.major, properties.minor)), properties.multi_processor_count


def _on(q: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes q's GPU the current one, which costs nothing if it is."""
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        return torch.cuda.device(q.device)
    return _ALREADY


def _new(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None, fill_zero: bool = False) -> Tensor:
    """Allocates every buffer, so that the tests can replace it by a function that returns guarded memory."""
    make = torch.zeros if fill_zero else torch.empty
    return make(shape, dtype=dtype or like.dtype, device=like.device)


def _result(q: Tensor, width: int, varlen: bool, contiguous: bool) -> Tensor:
    """Allocates o; see `dlkernels.attention.operators`."""
    if varlen:
        return _new((*q.shape[:2], width), q, fill_zero=True)
    shape = (*q.shape[:3], width)
    if contiguous or width != q.size(-1) or q.is_contiguous() or q.stride(-1) != 1:
        return _new(shape, q)
    if q.transpose(1, 2).is_contiguous():  # the usual layout of a projection's result: found without a tensor's help
        return _new((shape[0], shape[2], shape[1], width), q).transpose(1, 2)
    strides = torch.empty_like(q, device="meta").stride()
    return _new((q.numel(),), q).as_strided(shape, strides) if strides[-1] == 1 or width == 1 else _new(shape, q)


def _rows_like(x: Tensor, width: int, varlen: bool) -> Tensor:
    """Allocates [B, H, M, width] in the memory order [B, M, H, width], as in torch's own gradients; with varlen
    [rows, H, width], where rows that no sequence covers are 0."""
    if varlen:
        return _new((x.size(0), x.size(1), width), x, fill_zero=True)
    B, H, M = x.shape[:3]
    return _new((B, M, H, width), x).transpose(1, 2)


def _row_strides(call: Call, q: Tensor) -> tuple[int, int]:
    """(batch, head) of the log-sum-exp: [B, H, M], or [H, total_q] when packed. Statistics have twice these."""
    return (0, q.size(0)) if call.features & VARLEN else (call.H * call.M, call.M)


def _row_shape(call: Call, q: Tensor) -> tuple[int, ...]:
    return (call.H, q.size(0)) if call.features & VARLEN else (call.B, call.H, call.M)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, rng: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float, causal: int, window_left: int, window_right: int, softcap: float, dropout_p: float,
    contiguous: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, lse, stats); see the operator's schema. stats are in the units of the scores (kernels/elements.py)."""
    call = _describe(
        q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q, rng, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_left, window_right, softcap, dropout_p,
    )  # fmt: skip
    varlen = cu_seqlens_q is not None
    o = _result(q, call.DV, varlen, contiguous)
    *heads_shape, total = _row_shape(call, q)
    lse = _new((*heads_shape, total), q, torch.float32, fill_zero=varlen)
    stats = _new((*heads_shape, 2, total), q, torch.float32, fill_zero=varlen)
    if lse.numel() == 0 or call.M == 0:
        return o, lse, stats
    q, k, v = addresses.readable(q), addresses.readable(k), addresses.readable(v)
    arch, processors = _machine(q)
    plan = heuristics.forward_plan(
        arch, processors, call.half, max(padded(call.D), padded(call.DV)), bool(call.features & BUSY),
        call.mask_bytes, dropout_p > 0, call.B, call.H, call.GROUP, call.M, call.N,
    )  # fmt: skip
    block_m, block_n, warps, stages = plan.tile
    rows = call.M * call.GROUP if plan.packed else call.M
    heads = call.H // call.GROUP if plan.packed else call.H
    tiles_m = _cdiv(rows, block_m)
    split = plan.splits > 1
    part, part_stats = o, stats
    if split:
        part = _new((plan.splits, *o.shape), o, torch.float32)
        part_stats = _new((plan.splits, *stats.shape), stats)
    q_strides, k_strides, v_strides = addresses.strides(q), addresses.strides(k), addresses.strides(v)
    part_strides: tuple[int, ...] = addresses.strides(part[0] if split else part)
    align = addresses.align(q, (*q_strides, *k_strides, *v_strides, *part_strides), q, k, v, part)
    mask_strides, mask_align = addresses.mask_strides(mask)
    row_strides = (part_stats.stride(0) if split else 0, *_row_strides(call, q))
    part_strides = (part.stride(0) if split else 0, *part_strides)
    with _on(q):
        launch(
            forward, (tiles_m * call.B * heads, plan.splits),
            (q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, part, lse, part_stats),
            (*q_strides, *k_strides, *v_strides, *mask_strides, addresses.slope_stride(alibi_slopes), *part_strides,
             *row_strides, call.M, call.N, call.H, call.GROUP, tiles_m, plan.splits, *call.elementwise, *call.dropout,
             call.keep_scale),
            (call.features, align, mask_align, plan.packed, split, *call.widths, block_m, block_n, stages,
             call.precision),
            call.options(warps, stages),
        )  # fmt: skip
        if split:
            o_strides = addresses.strides(o)
            launch(
                combine, (_cdiv(call.M, _COMBINE_ROWS), call.B * call.H),
                (part, part_stats, sinks, cu_seqlens_q, o, lse, stats),
                (*part_strides, *row_strides, *o_strides, call.M, call.H, plan.splits),
                (call.features, addresses.align(o, (*o_strides, *part_strides), o, part), call.DV, padded(call.DV),
                 _COMBINE_ROWS, padded(plan.splits)),
                Options(),
            )  # fmt: skip
    return o, lse, stats


def attention_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, stats: Tensor, mask: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    rng: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: int, window_left: int,
    window_right: int, softcap: float, dropout_p: float, need_q: bool, need_kv: bool, need_mask: bool,
    need_slopes: bool, need_sinks: bool,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv, dmask, dslopes, dsinks], of shape [0] if not wanted; see the operator's schema."""
    call = _describe(
        q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q, rng, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_left, window_right, softcap, dropout_p,
    )  # fmt: skip
    varlen = cu_seqlens_q is not None
    if stats.numel() == 0 or call.M == 0:
        return _no_queries(q, k, v, mask, alibi_slopes, sinks, need_q, need_kv, need_mask, need_slopes, need_sinks)
    q, k, v, o, do = (addresses.readable(x) for x in (q, k, v, o, do))
    stats = stats.contiguous()
    arch, _ = _machine(q)

    def nothing() -> Tensor:
        return _new((0,), q)

    dq = dk = dv = dmask = dslopes = dsinks = None
    by_row, by_key, full = _mask_gradient_kind(mask) if need_mask else (False, False, False)
    with _on(q):
        spare = elements.SPARE.value
        align_rows = elements.STATS_ALIGN.value
        line = _cdiv(q.size(0) + call.B * spare if varlen else call.M + spare, align_rows) * align_rows
        stat_strides = (spare if varlen else call.H * line, line)
        stat_shape = (call.H, line) if varlen else (call.B, call.H, line)
        top, weight, delta = (_new(stat_shape, stats) for _ in range(3))
        tiles = _cdiv(call.M + spare, _PREPROCESS_ROWS)
        sink_part = _new((call.B * call.H * tiles,), stats) if need_sinks else None
        do_strides, o_strides = addresses.strides(do), addresses.strides(o)
        launch(
            preprocess, (call.B * call.H * tiles, 1),
            (o, do, stats, None if dlse is None else dlse.contiguous(), sinks, cu_seqlens_q, top, weight, delta,
             sink_part),
            (*o_strides, *do_strides, *_row_strides(call, q), *stat_strides, call.M, call.H, tiles),
            (call.features, addresses.align(o, (*o_strides, *do_strides), o, do), dlse is not None, need_sinks, call.DV,
             padded(call.DV), _PREPROCESS_ROWS),
            Options(),
        )  # fmt: skip
        if sink_part is not None and sinks is not None:
            dsinks = sink_part.view(call.B, call.H, tiles).sum((0, 2)).to(sinks.dtype)

        mask_strides, mask_align = addresses.mask_strides(mask)
        rows = (*addresses.strides(q), *addresses.strides(k), *addresses.strides(v), *do_strides)
        align = addresses.align(q, rows, q, k, v, do)
        inputs = (*rows, *mask_strides, addresses.slope_stride(alibi_slopes), *stat_strides)
        if need_q or need_slopes or by_row:
            block_m, block_n, warps, stages = call.tile("backward_query", arch)
            tiles = _cdiv(call.M, block_m)
            dq = _rows_like(q, call.D, varlen)
            dq_strides = addresses.strides(dq)
            slope_part = _new((call.B * call.H * tiles,), stats) if need_slopes else None
            mask_part = _new((call.B, call.H, call.M, 1), stats) if by_row else None
            launch(
                backward_query, (call.B * call.H * tiles, 1),
                (q, k, v, do, top, weight, delta, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, dq, slope_part,
                 mask_part),
                (*inputs, *dq_strides, call.M, call.N, call.H, call.GROUP, tiles, call.left, call.right,
                 call.softmax_scale, call.scale, call.cap, *call.dropout, call.keep_scale),
                (call.features, min(align, addresses.align(dq, dq_strides, dq)), mask_align, need_slopes, by_row,
                 *call.widths, block_m, block_n, stages, call.precision),
                call.options(warps, stages),
            )  # fmt: skip
            if slope_part is not None and alibi_slopes is not None:
                dslopes = slope_part.view(call.B, call.H, tiles).sum(2)
                dslopes = (dslopes.sum(0) if alibi_slopes.dim() == 1 else dslopes).to(alibi_slopes.dtype)
            if mask_part is not None and mask is not None:
                dmask = _reduce_to(mask_part, mask)

        if need_kv or by_key:
            block_m, block_n, warps, stages = call.tile("backward_key", arch)
            tiles = _cdiv(call.N, block_n)
            dk, dv = _rows_like(k, call.D, varlen), _rows_like(v, call.DV, varlen)
            dk_strides, dv_strides = addresses.strides(dk), addresses.strides(dv)
            mask_part = _new((call.B, call.H, 1, call.N), stats) if by_key else None
            if tiles:
                launch(
                    backward_key, (call.B * (call.H // call.GROUP) * tiles, 1),
                    (q, k, v, do, top, weight, delta, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, dk, dv,
                     mask_part),
                    (*inputs, *dk_strides, *dv_strides, call.M, call.N, call.H, call.GROUP, tiles, call.left,
                     call.right, call.softmax_scale, call.scale, call.cap, *call.dropout, call.keep_scale),
                    (call.features, min(align, addresses.align(dk, (*dk_strides, *dv_strides), dk, dv)), mask_align,
                     by_key, *call.widths, block_m, block_n, stages, call.precision),
                    call.options(warps, stages),
                )  # fmt: skip
            if mask_part is not None and mask is not None:
                dmask = _reduce_to(mask_part, mask)

        if full and mask is not None:
            block_m, block_n, warps, _ = call.tile("backward_query", arch)
            tiles_m, tiles_n = _cdiv(call.M, block_m), _cdiv(call.N, block_n)
            dmask = _new(mask.shape, mask)
            per_batch, per_head = mask.size(0) > 1, mask.size(1) > 1
            if tiles_n:
                launch(
                    mask_gradient, (tiles_m * tiles_n * mask.size(0) * mask.size(1), 1),
                    (q, k, v, do, top, weight, delta, mask, alibi_slopes, dmask),
                    (*inputs, call.M, call.N, call.B, call.H, call.GROUP, tiles_m, tiles_n, call.left, call.right,
                     call.scale, call.cap, *call.dropout, call.keep_scale),
                    (call.features, align, mask_align, per_batch, per_head, *call.widths, block_m, block_n, 1,
                     call.precision),
                    call.options(warps, 1),
                )  # fmt: skip
    wanted = (
        (dq, need_q), (dk, need_kv), (dv, need_kv), (dmask, need_mask), (dslopes, need_slopes), (dsinks, need_sinks),
    )  # fmt: skip
    return [gradient if need and gradient is not None else nothing() for gradient, need in wanted]


def _mask_gradient_kind(mask: Tensor | None) -> tuple[bool, bool, bool]:
    """Whether the mask has one value per query (or one in all), one per key, or one for each pair."""
    if mask is None or mask.dtype == torch.bool:
        return False, False, False
    by_row = mask.size(3) == 1
    by_key = not by_row and mask.size(2) == 1
    return by_row, by_key, not (by_row or by_key)


def _reduce_to(part: Tensor, mask: Tensor) -> Tensor:
    dims = [dim for dim in range(4) if mask.size(dim) == 1 and part.size(dim) != 1]
    return (part.sum(dims, keepdim=True) if dims else part).to(mask.dtype)


def _no_queries(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    need_q: bool, need_kv: bool, need_mask: bool, need_slopes: bool, need_sinks: bool,
) -> list[Tensor]:  # fmt: skip
    varlen = q.dim() == 3
    dk, dv = _rows_like(k, k.size(-1), varlen), _rows_like(v, v.size(-1), varlen)
    wanted = (
        (_rows_like(q, q.size(-1), varlen), need_q), (dk, need_kv), (dv, need_kv), (mask, need_mask),
        (alibi_slopes, need_slopes), (sinks, need_sinks),
    )  # fmt: skip
    return [
        _new((0,), q) if x is None or not need else x.zero_() if x is dk or x is dv else torch.zeros_like(x)
        for x, need in wanted
    ]


def attention_map(
    q: Tensor, k: Tensor, mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, softmax_scale: float,
    causal: int, window_left: int, window_right: int, softcap: float, rows: int, cols: int,
) -> Tensor:  # fmt: skip
    """[B, H, rows, cols]; see the operator's schema."""
    features = (mask, alibi_slopes, sinks, None, None, None, 0, 0, softmax_scale, causal, window_left, window_right)
    no_values = k[..., :0]
    call = _describe(
        q, k, no_values, mask, alibi_slopes, sinks, None, None, 0, 0, softmax_scale, causal, window_left, window_right,
        softcap, 0.0,
    )  # fmt: skip
    out = _new((call.B, call.H, rows, cols), q, torch.float32)
    if out.numel() == 0:
        return out
    if call.M == 0 or call.N == 0:
        return out.zero_()
    # The forward pass runs only for its statistics, with values of width 0.
    _, _, stats = attention_forward(q, k, no_values, *features, softcap, 0.0, True)
    q, k = addresses.readable(q), addresses.readable(k)
    strides = (*addresses.strides(q), *addresses.strides(k))
    mask_strides, mask_align = addresses.mask_strides(mask)
    with _on(q):
        launch(
            map_kernel, (out.numel(), 1), (q, k, stats, mask, alibi_slopes, out),
            (*strides, *mask_strides, addresses.slope_stride(alibi_slopes), call.M, call.N, call.H, call.GROUP, rows,
             cols, *call.elementwise),
            (call.features, addresses.align(q, strides, q, k), mask_align, call.D, padded(call.D), _MAP_TILE, _MAP_TILE,
             call.precision),
            call.options(4, 2),
        )  # fmt: skip
    return out
