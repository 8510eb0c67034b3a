"""Forward pass: o, the log-sum-exp and the softmax's statistics. For decoding it can be split over the keys; `combine`
then joins the parts."""

import triton
import triton.language as tl

from dlkernels.attention.triton.kernels.elements import (
    ALIBI,
    ANY_MASK,
    CHANGES_SCORES,
    DROPOUT,
    HIDES,
    LEFT,
    REPAIR,
    RIGHT,
    SINKS,
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
    start_with_sink,
    store_statistics,
    unit,
)  # fmt: skip
from dlkernels.attention.triton.kernels.entry import entry


@triton.jit
def _walk(
    acc, l, m, q, begin, end, gap, skip, k_base, v_base, stride_kn, stride_vn, i, live, head, N, shift, left, right,
    scale, cap, slope, mask_rows, stride_mask_n, seed, offset, threshold, FEATURES: tl.constexpr, EDGE: tl.constexpr,
    CAREFUL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulates keys into (acc, l, m): sum of p v, sum of p and largest score, per query. They are begin..end; with
    EDGE those from `gap` on are `skip` further, so that one loop takes the cut tiles on both sides of the whole
    ones."""
    EXACT: tl.constexpr = q.dtype == tl.float32
    cols = tl.arange(0, BLOCK_N)
    for at in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        start = at
        if EDGE and (LEFT & FEATURES):
            start = at + tl.where(at < gap, 0, skip)
        start = tl.multiple_of(start, BLOCK_N)
        k = load_rows(k_base, start, cols, stride_kn, N, D, BLOCK_D, EDGE)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j = (start + cols)[None, :]
        if not EDGE and (CHANGES_SCORES & FEATURES) == 0 and not EXACT:
            # The multiplication by the scale and the subtraction are one FMA.
            top = tl.maximum(m, tl.max(dots, 1) * scale)
            p = tl.exp2(dots * scale - top[:, None])
            seen = dots == dots  # unused: only CAREFUL reads it, and CAREFUL comes with EDGE
            shrink = tl.exp2(m - top)
        else:
            s, _tanh = scores(
                dots, i, j, live, N, shift, left, right, scale, cap, slope, mask_rows, stride_mask_n, FEATURES, EDGE,
                EXACT,
            )  # fmt: skip
            top = tl.maximum(m, tl.max(s, 1))
            # For a query that has seen no key yet, -inf - -inf would be NaN.
            base = tl.where(top == float("-inf"), 0.0, top)
            p = power(s - base[:, None], EXACT)
            seen = s != float("-inf")
            shrink = power(m - base, EXACT)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        if DROPOUT & FEATURES:
            p = tl.where(kept(i, start, head, seed, offset, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        v = load_rows(v_base, start, cols, stride_vn, N, DV, BLOCK_DV, EDGE)
        acc = product(p, v, acc, seen, CAREFUL, PRECISION)
        m = top
    return acc, l, m


@triton.jit
def _rows(
    first, begin, full_begin, full_end, end, b, outer, row0, M, col0, N, shift, q_ptr, k_ptr, v_ptr, mask_ptr,
    slopes_ptr, sinks_ptr, o_ptr, lse_ptr, stats_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_slope_b,
    stride_os, stride_ob, stride_oh, stride_om, stride_ls, stride_lb, stride_lh, H, GROUP, left, right, scale, cap,
    seed, offset, threshold, keep_scale, FEATURES: tl.constexpr, CAREFUL: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the rows `first`.. of the program's heads over the keys begin..end, and stores them. If o holds a NaN
    that may come from a hidden element, it stores nothing and returns True; the caller then calls it with CAREFUL."""
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    rows = first + tl.arange(0, BLOCK_M)
    if PACKED:
        kv_head = outer % (H // GROUP)
        live = rows < M * GROUP
        h = tl.where(live, kv_head * GROUP + rows // tl.maximum(M, 1), 0)
        i = tl.where(live, rows % tl.maximum(M, 1), 0)
        head = (b * H + h)[:, None]
    else:
        h = outer % H
        kv_head = h // GROUP
        i = rows
        live = rows < M
        head = b * H + h
    b64, h64, kv64 = b.to(tl.int64), h.to(tl.int64), kv_head.to(tl.int64)
    i64 = row0.to(tl.int64) + i
    dims = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + b64 * stride_qb + h64 * stride_qh + i64 * stride_qm
    q = tl.load(q_rows[:, None] + dims[None, :], mask=live[:, None] & (dims < D)[None, :], other=0.0)
    k_base = k_ptr + b64 * stride_kb + kv64 * stride_kh + col0.to(tl.int64) * stride_kn
    v_base = v_ptr + b64 * stride_vb + kv64 * stride_vh + col0.to(tl.int64) * stride_vn
    slope = 0.0
    if ALIBI & FEATURES:
        slope = tl.load(slopes_ptr + b64 * stride_slope_b + h64).to(tl.float32) * unit(EXACT)
        if PACKED:
            slope = slope[:, None]
    mask_rows = mask_ptr
    if ANY_MASK & FEATURES:
        mask_rows = (mask_ptr + b64 * stride_mask_b + h64 * stride_mask_h + i.to(tl.int64) * stride_mask_m)[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    column = i[:, None]
    alive = live[:, None]
    skip = full_end - full_begin
    if not CAREFUL:
        acc, l, m = _walk(
            acc, l, m, q, full_begin, full_end, end, 0, k_base, v_base, stride_kn, stride_vn, column, alive, head, N,
            shift, left, right, scale, cap, slope, mask_rows, stride_mask_n, seed, offset, threshold, FEATURES, False,
            False, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, PRECISION,
        )  # fmt: skip
        if not (LEFT & FEATURES):
            begin = full_end
            skip = 0
    else:
        skip = 0
    acc, l, m = _walk(
        acc, l, m, q, begin, end - skip, full_begin, skip, k_base, v_base, stride_kn, stride_vn, column, alive, head, N,
        shift, left, right, scale, cap, slope, mask_rows, stride_mask_n, seed, offset, threshold, FEATURES, True,
        CAREFUL, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, PRECISION,
    )  # fmt: skip
    doubtful = False
    if (HIDES & FEATURES) and not CAREFUL:
        doubtful = has_nan(acc)
        live = live & (doubtful == 0)

    sink = float("-inf")
    natural_sink = sink
    if (SINKS & FEATURES) and not SPLIT:
        natural_sink = load_sink(sinks_ptr + h64)
        sink = sink_score(natural_sink, EXACT)
        m, l, shrink = start_with_sink(m, l, sink, EXACT)
        acc = acc * shrink[:, None]
    # The statistics are stored before acc is scaled and stored; otherwise their values would spill.
    split = tl.program_id(1)
    of_head = b64 * stride_lb + h64 * stride_lh
    stats_rows = stats_ptr + split * stride_ls + 2 * of_head + i64
    if SPLIT:
        tl.store(stats_rows, m, mask=live)
        tl.store(stats_rows + stride_lh, l, mask=live)
    else:
        store_statistics(stats_rows, lse_ptr + of_head + i64, stride_lh, m, l, sink, natural_sink, live, EXACT)

    acc = acc * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    dims_v = tl.arange(0, BLOCK_DV)
    o_rows = o_ptr + split * stride_os + b64 * stride_ob + h64 * stride_oh + i64 * stride_om
    tl.store(o_rows[:, None] + dims_v[None, :], acc, mask=live[:, None] & (dims_v < DV)[None, :])
    return doubtful


@entry
def forward(
    q_ptr, k_ptr, v_ptr, mask_ptr, slopes_ptr, sinks_ptr, cu_q, cu_k, o_ptr, lse_ptr, stats_ptr, stride_qb, stride_qh,
    stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_mask_b, stride_mask_h,
    stride_mask_m, stride_mask_n, stride_slope_b, stride_os, stride_ob, stride_oh, stride_om, stride_ls, stride_lb,
    stride_lh, M, N, H, GROUP, tiles_m, splits, left, right, scale, cap, seed, offset, threshold, keep_scale,
    FEATURES: tl.constexpr, ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program computes a tile of queries of one head; with PACKED, of all query heads that share a key head, so
    that decoding, where M is 1, fills a tile. With SPLIT, program_id(1) selects a part of the keys, and the program
    stores a normalised float32 o, its largest score and its sum, without the sink, for `combine`. lse: [.., M], stats:
    [.., 2, M]."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, ALIGN)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_ob, stride_oh, stride_om = multiples(stride_ob, stride_oh, stride_om, ALIGN)
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n = mask_strides(
        stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, MASK_ALIGN
    )
    tile = tl.program_id(0) % tiles_m
    outer = tl.program_id(0) // tiles_m
    if RIGHT & FEATURES:
        # Under a causal mask later queries see more keys, so their programs start first.
        tile = tiles_m - 1 - tile
    first = tile * BLOCK_M
    b = outer // H
    if PACKED:
        b = outer // (H // GROUP)
    row0, M, col0, N, shift = sequence(cu_q, cu_k, b, M, N, FEATURES)
    if PACKED:
        i_first = 0
        i_last = M - 1
        row_count = M * GROUP
    else:
        i_first = first
        i_last = tl.minimum(first + BLOCK_M, M) - 1
        row_count = M
    if first >= row_count:
        return

    begin, full_begin, full_end, end = key_range(i_first, i_last, N, shift, left, right, FEATURES, BLOCK_N)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
        begin = begin + tl.program_id(1) * share
        end = tl.minimum(end, begin + share)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    doubtful = _rows(
        first, begin, full_begin, full_end, end, b, outer, row0, M, col0, N, shift, q_ptr, k_ptr, v_ptr, mask_ptr,
        slopes_ptr, sinks_ptr, o_ptr, lse_ptr, stats_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
        stride_kn, stride_vb, stride_vh, stride_vn, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
        stride_slope_b, stride_os, stride_ob, stride_oh, stride_om, stride_ls, stride_lb, stride_lh, H, GROUP, left,
        right, scale, cap, seed, offset, threshold, keep_scale, FEATURES, False, PACKED, SPLIT, D, DV, BLOCK_D,
        BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, PRECISION,
    )  # fmt: skip
    if HIDES & FEATURES:
        if doubtful:
            # The NaN may be 0 * NaN with a value that the query does not see.
            FEW_M: tl.constexpr = min(BLOCK_M, REPAIR)
            FEW_N: tl.constexpr = min(BLOCK_N, REPAIR)
            for part in range(0, BLOCK_M, FEW_M):
                _rows(
                    first + part, begin, full_begin, full_end, end, b, outer, row0, M, col0, N, shift, q_ptr, k_ptr,
                    v_ptr, mask_ptr, slopes_ptr, sinks_ptr, o_ptr, lse_ptr, stats_ptr, stride_qb, stride_qh, stride_qm,
                    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_mask_b, stride_mask_h,
                    stride_mask_m, stride_mask_n, stride_slope_b, stride_os, stride_ob, stride_oh, stride_om, stride_ls,
                    stride_lb, stride_lh, H, GROUP, left, right, scale, cap, seed, offset, threshold, keep_scale,
                    FEATURES, True, PACKED, SPLIT, D, DV, BLOCK_D, BLOCK_DV, FEW_M, FEW_N, 1, PRECISION,
                )  # fmt: skip


@entry
def combine(
    part_ptr, part_stats_ptr, sinks_ptr, cu_q, o_ptr, lse_ptr, stats_ptr, stride_ps, stride_pb, stride_ph, stride_pm,
    stride_ls, stride_lb, stride_lh, stride_ob, stride_oh, stride_om, M, H, splits, FEATURES: tl.constexpr,
    ALIGN: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Joins the parts of a split forward pass, weighted by their largest scores and sums, and adds the sink."""
    EXACT: tl.constexpr = o_ptr.dtype.element_ty == tl.float32
    stride_pb, stride_ph, stride_pm = multiples(stride_pb, stride_ph, stride_pm, ALIGN)
    stride_ob, stride_oh, stride_om = multiples(stride_ob, stride_oh, stride_om, ALIGN)
    outer = tl.program_id(1)
    b = outer // H
    h = outer % H
    row0 = b * 0
    if VARLEN & FEATURES:
        row0 = tl.load(cu_q + b)
        M = tl.load(cu_q + b + 1) - row0
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < M
    b64, h64, i64 = b.to(tl.int64), h.to(tl.int64), row0.to(tl.int64) + rows
    of_head = b64 * stride_lb + h64 * stride_lh
    # The parts' statistics have the layout of the result's statistics with a leading dimension for the split.
    stats_rows = part_stats_ptr + 2 * of_head + i64
    parts = tl.arange(0, BLOCK_S)
    every = stats_rows[:, None] + parts[None, :].to(tl.int64) * stride_ls
    there = live[:, None] & (parts < splits)[None, :]
    part_top = tl.load(every, mask=there, other=float("-inf"))
    m = tl.max(part_top, 1)
    sink = float("-inf")
    natural_sink = sink
    if SINKS & FEATURES:
        natural_sink = load_sink(sinks_ptr + h64)
        sink = sink_score(natural_sink, EXACT)
        m = tl.maximum(m, sink)
    base = tl.where(m == float("-inf"), 0.0, m)
    part_sum = tl.load(every + stride_lh, mask=there, other=0.0)
    l = tl.sum(power(part_top - base[:, None], EXACT) * part_sum, 1) + power(sink - base, EXACT)
    dims = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    inside = live[:, None] & (dims < DV)[None, :]
    for split in range(splits):
        part_rows = stats_rows + split * stride_ls
        weight = power(tl.load(part_rows, mask=live, other=float("-inf")) - base, EXACT)
        weight *= tl.load(part_rows + stride_lh, mask=live, other=0.0)
        o_part = part_ptr + split * stride_ps + b64 * stride_pb + h64 * stride_ph + i64 * stride_pm
        acc += weight[:, None] * tl.load(o_part[:, None] + dims[None, :], mask=inside, other=0.0)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    o_rows = o_ptr + b64 * stride_ob + h64 * stride_oh + i64 * stride_om
    tl.store(o_rows[:, None] + dims[None, :], acc, mask=inside)
    store_statistics(
        stats_ptr + 2 * of_head + i64, lse_ptr + of_head + i64, stride_lh, m, l, sink, natural_sink, live, EXACT
    )
