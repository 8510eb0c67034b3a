"""Backward pass, by query: delta and the sinks' gradient, then dq, with the slopes' gradient and that of a mask which
has one value per query. One program computes a tile of queries and loops over the keys in order, without atomics."""

import triton
import triton.language as tl

from dlkernels.attention.triton.kernels.elements import (
    ALIBI,
    ANY_MASK,
    DROPOUT,
    HIDES,
    LEFT,
    REPAIR,
    RIGHT,
    SOFTCAP,
    SPARE,
    VARLEN,
    has_nan,
    kept,
    key_range,
    load_rows,
    load_sink,
    mask_strides,
    multiples,
    power,
    product,
    scores,
    sequence,
    sink_score,
    stats_start,
    unit,
)  # fmt: skip
from dlkernels.attention.triton.kernels.entry import entry


@entry
def preprocess(
    o_ptr, do_ptr, stats_ptr, dlse_ptr, sinks_ptr, cu_q, top_ptr, weight_ptr, delta_ptr, sink_part_ptr, stride_ob,
    stride_oh, stride_om, stride_gb, stride_gh, stride_gm, stride_lb, stride_lh, stride_sb, stride_sh, M, H, tiles_m,
    FEATURES: tl.constexpr, ALIGN: tl.constexpr, DLSE: tl.constexpr, SINK_GRAD: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Computes delta = rowsum(o * do) - dlse, and for each tile its part of the sinks' gradient, -sum(p_sink * delta).

    It also copies the softmax's statistics. All three get SPARE rows, with a weight of 0, after each sequence.
    """
    EXACT: tl.constexpr = o_ptr.dtype.element_ty == tl.float32
    stride_ob, stride_oh, stride_om = multiples(stride_ob, stride_oh, stride_om, ALIGN)
    stride_gb, stride_gh, stride_gm = multiples(stride_gb, stride_gh, stride_gm, ALIGN)
    tile = tl.program_id(0) % tiles_m
    outer = tl.program_id(0) // tiles_m
    b = outer // H
    h = outer % H
    row0 = b * 0
    if VARLEN & FEATURES:
        row0 = tl.load(cu_q + b)
        M = tl.load(cu_q + b + 1) - row0
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < M
    b64, h64, i64 = b.to(tl.int64), h.to(tl.int64), row0.to(tl.int64) + rows
    dims = tl.arange(0, BLOCK_DV)
    there = live[:, None] & (dims < DV)[None, :]
    o_rows = o_ptr + b64 * stride_ob + h64 * stride_oh + i64 * stride_om
    do_rows = do_ptr + b64 * stride_gb + h64 * stride_gh + i64 * stride_gm
    o = tl.load(o_rows[:, None] + dims[None, :], mask=there, other=0.0).to(tl.float32)
    do = tl.load(do_rows[:, None] + dims[None, :], mask=there, other=0.0).to(tl.float32)
    # A query that sees no key has o = 0 and no gradient, even if its do is NaN or infinite.
    delta = tl.sum(tl.where(o == 0.0, 0.0, o * do), 1)
    of_head = b64 * stride_lb + h64 * stride_lh
    if DLSE:
        delta -= tl.load(dlse_ptr + of_head + i64, mask=live, other=0.0)
    stats_rows = stats_ptr + 2 * of_head + i64
    top = tl.load(stats_rows, mask=live, other=float("inf"))
    weight = tl.load(stats_rows + stride_lh, mask=live, other=0.0)
    stats = stats_start(b, h, row0, stride_sb, stride_sh, FEATURES) + rows
    inside = rows < M + SPARE
    tl.store(top_ptr + stats, top, mask=inside)
    tl.store(weight_ptr + stats, weight, mask=inside)
    tl.store(delta_ptr + stats, delta, mask=inside)
    if SINK_GRAD:
        sink = sink_score(load_sink(sinks_ptr + h64), EXACT)
        p_sink = power(sink - top, EXACT) * weight
        tl.store(sink_part_ptr + tl.program_id(0), -tl.sum(p_sink * delta, 0))


@triton.jit
def _walk(
    dq, slope_grad, mask_grad, q, do, top, delta, begin, end, gap, skip, k_base, v_base, stride_kn, stride_vn, i, live,
    head, N, shift, left, right, scale, cap, slope, mask_rows, stride_mask_n, seed, offset, threshold, keep_scale,
    FEATURES: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr, SLOPE_GRAD: tl.constexpr,
    MASK_GRAD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulates keys into dq, slope_grad and mask_grad, which the caller multiplies by the query's weight. forward.py
    says which keys."""
    EXACT: tl.constexpr = q.dtype == tl.float32
    cols = tl.arange(0, BLOCK_N)
    for at in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        start = at
        if EDGE and (LEFT & FEATURES):
            start = at + tl.where(at < gap, 0, skip)
        start = tl.multiple_of(start, BLOCK_N)
        k = load_rows(k_base, start, cols, stride_kn, N, D, BLOCK_D, EDGE)
        v = load_rows(v_base, start, cols, stride_vn, N, DV, BLOCK_DV, EDGE)
        j = (start + cols)[None, :]
        s, t = scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), i, j, live, N, shift, left, right, scale, cap, slope,
            mask_rows, stride_mask_n, FEATURES, EDGE, EXACT,
        )  # fmt: skip
        p = power(s - top, EXACT)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT & FEATURES:
            dp = tl.where(kept(i, start, head, seed, offset, threshold, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
        ds = p * (dp - delta)
        seen = s != float("-inf")
        if EDGE or (ANY_MASK & FEATURES):
            ds = tl.where(seen, ds, 0.0)  # p is 0 there, but dp may be NaN
        if SLOPE_GRAD:
            slope_grad -= tl.sum(ds * tl.abs(i + shift - j).to(tl.float32), 1)
        if MASK_GRAD:
            mask_grad += tl.sum(ds, 1)
        if SOFTCAP & FEATURES:
            ds = ds * (1 - t * t)
            if EDGE or (ANY_MASK & FEATURES):
                ds = tl.where(seen, ds, 0.0)
        dq = product(ds, k, dq, seen, CAREFUL, PRECISION)
    return dq, slope_grad, mask_grad


@triton.jit
def _rows(
    i_first, begin, full_begin, full_end, end, b, h, row0, M, col0, N, shift, q_ptr, k_ptr, v_ptr, do_ptr, top_ptr,
    weight_ptr, delta_ptr, mask_ptr, slopes_ptr, dq_ptr, slope_part, mask_part_ptr, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm, stride_mask_b,
    stride_mask_h, stride_mask_m, stride_mask_n, stride_slope_b, stride_sb, stride_sh, stride_dqb, stride_dqh,
    stride_dqm, H, GROUP, left, right, softmax_scale, scale, cap, seed, offset, threshold, keep_scale,
    FEATURES: tl.constexpr, CAREFUL: tl.constexpr, SLOPE_GRAD: tl.constexpr, MASK_GRAD: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes and stores the queries i_first.. of a head over the keys begin..end. If dq holds a NaN that may come
    from a hidden element, it does not store dq and returns True; the caller then calls it with CAREFUL."""
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    rows = i_first + tl.arange(0, BLOCK_M)
    live = rows < M
    b64, h64, kv64 = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
    i64 = row0.to(tl.int64) + rows
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_rows = q_ptr + b64 * stride_qb + h64 * stride_qh + i64 * stride_qm
    q = tl.load(q_rows[:, None] + dims[None, :], mask=live[:, None] & (dims < D)[None, :], other=0.0)
    do_rows = do_ptr + b64 * stride_gb + h64 * stride_gh + i64 * stride_gm
    do = tl.load(do_rows[:, None] + dims_v[None, :], mask=live[:, None] & (dims_v < DV)[None, :], other=0.0)
    stats = stats_start(b, h, row0, stride_sb, stride_sh, FEATURES) + rows
    top = tl.load(top_ptr + stats)[:, None]
    weight = tl.load(weight_ptr + stats)
    delta = tl.load(delta_ptr + stats)[:, None]
    k_base = k_ptr + b64 * stride_kb + kv64 * stride_kh + col0.to(tl.int64) * stride_kn
    v_base = v_ptr + b64 * stride_vb + kv64 * stride_vh + col0.to(tl.int64) * stride_vn
    slope = 0.0
    if ALIBI & FEATURES:
        slope = tl.load(slopes_ptr + b64 * stride_slope_b + h64).to(tl.float32) * unit(EXACT)
    mask_rows = mask_ptr
    if ANY_MASK & FEATURES:
        mask_rows = (mask_ptr + b64 * stride_mask_b + h64 * stride_mask_h + rows.to(tl.int64) * stride_mask_m)[:, None]

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slope_grad = tl.zeros([BLOCK_M], tl.float32)
    mask_grad = tl.zeros([BLOCK_M], tl.float32)
    i = rows[:, None]
    alive = live[:, None]
    head = b * H + h
    skip = full_end - full_begin
    if not CAREFUL:
        dq, slope_grad, mask_grad = _walk(
            dq, slope_grad, mask_grad, q, do, top, delta, full_begin, full_end, end, 0, k_base, v_base, stride_kn,
            stride_vn, i, alive, head, N, shift, left, right, scale, cap, slope, mask_rows, stride_mask_n, seed, offset,
            threshold, keep_scale, FEATURES, False, False, SLOPE_GRAD, MASK_GRAD, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M,
            BLOCK_N, STAGES, PRECISION,
        )  # fmt: skip
        if not (LEFT & FEATURES):
            begin = full_end
            skip = 0
    else:
        skip = 0
    dq, slope_grad, mask_grad = _walk(
        dq, slope_grad, mask_grad, q, do, top, delta, begin, end - skip, full_begin, skip, k_base, v_base, stride_kn,
        stride_vn, i, alive, head, N, shift, left, right, scale, cap, slope, mask_rows, stride_mask_n, seed, offset,
        threshold, keep_scale, FEATURES, True, CAREFUL, SLOPE_GRAD, MASK_GRAD, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M,
        BLOCK_N, STAGES, PRECISION,
    )  # fmt: skip

    if SLOPE_GRAD:
        tl.store(slope_part, tl.sum(tl.where(live, slope_grad * weight, 0.0), 0))
    if MASK_GRAD:
        tl.store(mask_part_ptr + head.to(tl.int64) * M + rows, mask_grad * weight, mask=live)
    doubtful = False
    if (HIDES & FEATURES) and not CAREFUL:
        doubtful = has_nan(dq)
        live = live & (doubtful == 0)
    dq_rows = dq_ptr + b64 * stride_dqb + h64 * stride_dqh + i64 * stride_dqm
    factor = (weight * softmax_scale)[:, None]
    tl.store(dq_rows[:, None] + dims[None, :], dq * factor, mask=live[:, None] & (dims < D)[None, :])
    return doubtful


@entry
def backward_query(
    q_ptr, k_ptr, v_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, cu_q, cu_k, dq_ptr,
    slope_part_ptr, mask_part_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb,
    stride_vh, stride_vn, stride_gb, stride_gh, stride_gm, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_slope_b, stride_sb, stride_sh, stride_dqb, stride_dqh, stride_dqm, M, N, H, GROUP, tiles_m, left, right,
    softmax_scale, scale, cap, seed, offset, threshold, keep_scale, FEATURES: tl.constexpr, ALIGN: tl.constexpr,
    MASK_ALIGN: tl.constexpr, SLOPE_GRAD: tl.constexpr, MASK_GRAD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """slope_part: [B * H * tiles_m]. mask_part: [B, H, M], the sum over the keys."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, ALIGN)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_gb, stride_gh, stride_gm = multiples(stride_gb, stride_gh, stride_gm, ALIGN)
    stride_dqb, stride_dqh, stride_dqm = multiples(stride_dqb, stride_dqh, stride_dqm, ALIGN)
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n = mask_strides(
        stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, MASK_ALIGN
    )
    tile = tl.program_id(0) % tiles_m
    outer = tl.program_id(0) // tiles_m
    if RIGHT & FEATURES:
        tile = tiles_m - 1 - tile
    b = outer // H
    h = outer % H
    row0, M, col0, N, shift = sequence(cu_q, cu_k, b, M, N, FEATURES)
    i_first = tile * BLOCK_M
    slope_part = slope_part_ptr
    if SLOPE_GRAD:
        slope_part += outer * tiles_m + tile
    if i_first >= M:
        if SLOPE_GRAD:
            tl.store(slope_part, 0.0)
        return
    i_last = tl.minimum(i_first + BLOCK_M, M) - 1
    begin, full_begin, full_end, end = key_range(i_first, i_last, N, shift, left, right, FEATURES, BLOCK_N)
    doubtful = _rows(
        i_first, begin, full_begin, full_end, end, b, h, row0, M, col0, N, shift, q_ptr, k_ptr, v_ptr, do_ptr, top_ptr,
        weight_ptr, delta_ptr, mask_ptr, slopes_ptr, dq_ptr, slope_part, mask_part_ptr, stride_qb, stride_qh, stride_qm,
        stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm,
        stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_slope_b, stride_sb, stride_sh, stride_dqb,
        stride_dqh, stride_dqm, H, GROUP, left, right, softmax_scale, scale, cap, seed, offset, threshold, keep_scale,
        FEATURES, False, SLOPE_GRAD, MASK_GRAD, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, PRECISION,
    )  # fmt: skip
    if HIDES & FEATURES:
        if doubtful:
            # The NaN may come from a key that the query does not see. The two other sums are elementwise and right.
            FEW_M: tl.constexpr = min(BLOCK_M, REPAIR)
            FEW_N: tl.constexpr = min(BLOCK_N, REPAIR)
            for part in range(0, BLOCK_M, FEW_M):
                _rows(
                    i_first + part, begin, full_begin, full_end, end, b, h, row0, M, col0, N, shift, q_ptr, k_ptr,
                    v_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, dq_ptr, slope_part,
                    mask_part_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb,
                    stride_vh, stride_vn, stride_gb, stride_gh, stride_gm, stride_mask_b, stride_mask_h, stride_mask_m,
                    stride_mask_n, stride_slope_b, stride_sb, stride_sh, stride_dqb, stride_dqh, stride_dqm, H, GROUP,
                    left, right, softmax_scale, scale, cap, seed, offset, threshold, keep_scale, FEATURES, True,
                    False, False, D, DV, BLOCK_D, BLOCK_DV, FEW_M, FEW_N, 1, PRECISION,
                )  # fmt: skip
