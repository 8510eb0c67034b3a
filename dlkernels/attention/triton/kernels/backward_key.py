"""Backward pass, by key: dk and dv, and the gradient of a mask which has one value per key. One program computes a tile
of keys. It loops over the queries of all heads that share the keys in a fixed order, so there are no atomics and no
copy per query head."""

import triton
import triton.language as tl

from dlkernels.attention.triton.kernels.elements import (
    ALIBI,
    ANY_MASK,
    DROPOUT,
    HIDES,
    RIGHT,
    SOFTCAP,
    has_nan,
    kept,
    load_rows,
    mask_strides,
    multiples,
    power,
    product,
    query_range,
    scores,
    sequence,
    stats_start,
    unit,
)  # fmt: skip
from dlkernels.attention.triton.kernels.entry import entry


@triton.jit
def _walk(
    dk, dv, mask_grad, k, v, begin, end, gap, skip, q_base, do_base, top_base, weight_base, delta_base, stride_qm,
    stride_gm, j, first_j, head, M, N, shift, left, right, scale, cap, slope, mask_base, stride_mask_m, stride_mask_n,
    seed, offset, threshold, keep_scale, FEATURES: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, MASK_GRAD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulates queries into dk, dv and mask_grad: begin..end; with EDGE those from `gap` on are `skip` further, so
    that one loop takes the cut tiles on both sides of the whole ones. Tiles are [keys, queries], so that p and ds are
    the left factors of dv and dk without a transpose."""
    EXACT: tl.constexpr = k.dtype == tl.float32
    rows = tl.arange(0, BLOCK_M)
    for at in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        start = at
        if EDGE and (RIGHT & FEATURES):
            start = at + tl.where(at < gap, 0, skip)
        start = tl.multiple_of(start, BLOCK_M)
        q = load_rows(q_base, start, rows, stride_qm, M, D, BLOCK_D, EDGE)
        i = start + rows
        live = i < M
        # The rows' statistics are loaded without a mask, because SPARE rows follow each sequence, and only where they
        # are used, because they would spill if they were loaded here.
        mask_rows = mask_base
        if ANY_MASK & FEATURES:
            mask_rows = (mask_base + i.to(tl.int64) * stride_mask_m)[None, :]
        s, t = scores(
            tl.dot(k, tl.trans(q), input_precision=PRECISION), i[None, :], j, live[None, :], N, shift, left, right,
            scale, cap, slope, mask_rows, stride_mask_n, FEATURES, EDGE, EXACT,
        )  # fmt: skip
        p = power(s - tl.load(top_base + i)[None, :], EXACT) * tl.load(weight_base + i)[None, :]
        seen = s != float("-inf")
        if EDGE or (ANY_MASK & FEATURES):
            p = tl.where(seen, p, 0.0)  # the row's statistics are NaN if its query has a NaN
        do = load_rows(do_base, start, rows, stride_gm, M, DV, BLOCK_DV, EDGE)
        if DROPOUT & FEATURES:
            keep = tl.trans(kept(i[:, None], first_j, head, seed, offset, threshold, BLOCK_M, BLOCK_N))
        if WANT_DV:
            if DROPOUT & FEATURES:
                dv = product(tl.where(keep, p, 0.0), do, dv, seen, CAREFUL, PRECISION)
            else:
                dv = product(p, do, dv, seen, CAREFUL, PRECISION)
        if WANT_DK:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            if DROPOUT & FEATURES:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - tl.load(delta_base + i)[None, :])
            if EDGE or (ANY_MASK & FEATURES):
                ds = tl.where(seen, ds, 0.0)
            if MASK_GRAD:
                mask_grad += tl.sum(ds, 1)
            if SOFTCAP & FEATURES:
                ds = ds * (1 - t * t)
                if EDGE or (ANY_MASK & FEATURES):
                    ds = tl.where(seen, ds, 0.0)
            dk = product(ds, q, dk, seen, CAREFUL, PRECISION)
    return dk, dv, mask_grad


@triton.jit
def _heads(
    dk, dv, k, v, q_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, mask_part_ptr, stride_qb,
    stride_qh, stride_qm, stride_gb, stride_gh, stride_gm, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    stride_slope_b, stride_sb, stride_sh, b, kv_head, row0, first_j, M, N, shift, H, GROUP, left, right, scale, cap,
    seed, offset, threshold, keep_scale, FEATURES: tl.constexpr, CAREFUL: tl.constexpr, WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr, MASK_GRAD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulates all query heads of the key head, one after the other."""
    EXACT: tl.constexpr = k.dtype == tl.float32
    cols = first_j + tl.arange(0, BLOCK_N)
    j = cols[:, None]
    begin, full_begin, full_end, end = query_range(
        first_j, first_j + BLOCK_N - 1, M, N, shift, left, right, FEATURES, BLOCK_M
    )
    b64 = b.to(tl.int64)
    for member in range(GROUP):
        h = kv_head * GROUP + member
        h64 = h.to(tl.int64)
        head = b * H + h
        q_base = q_ptr + b64 * stride_qb + h64 * stride_qh + row0.to(tl.int64) * stride_qm
        do_base = do_ptr + b64 * stride_gb + h64 * stride_gh + row0.to(tl.int64) * stride_gm
        stats = stats_start(b, h, row0, stride_sb, stride_sh, FEATURES)
        top_base = top_ptr + stats
        weight_base = weight_ptr + stats
        delta_base = delta_ptr + stats
        slope = 0.0
        if ALIBI & FEATURES:
            slope = tl.load(slopes_ptr + b64 * stride_slope_b + h64).to(tl.float32) * unit(EXACT)
        mask_base = mask_ptr
        if ANY_MASK & FEATURES:
            mask_base = mask_ptr + b64 * stride_mask_b + h64 * stride_mask_h
        mask_grad = tl.zeros([BLOCK_N], tl.float32)
        edge_begin = begin
        skip = full_end - full_begin
        if not CAREFUL:
            dk, dv, mask_grad = _walk(
                dk, dv, mask_grad, k, v, full_begin, full_end, end, 0, q_base, do_base, top_base, weight_base,
                delta_base, stride_qm, stride_gm, j, first_j, head, M, N, shift, left, right, scale, cap, slope,
                mask_base, stride_mask_m, stride_mask_n, seed, offset, threshold, keep_scale, FEATURES, False, False,
                WANT_DK, WANT_DV, MASK_GRAD, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, PRECISION,
            )  # fmt: skip
            if not (RIGHT & FEATURES):
                edge_begin = full_end
                skip = 0
        else:
            skip = 0
        # Tiles at an edge have 1 stage: they are few, and their bounds checks take the registers that loading ahead
        # would need.
        dk, dv, mask_grad = _walk(
            dk, dv, mask_grad, k, v, edge_begin, end - skip, full_begin, skip, q_base, do_base, top_base, weight_base,
            delta_base, stride_qm, stride_gm, j, first_j, head, M, N, shift, left, right, scale, cap, slope, mask_base,
            stride_mask_m, stride_mask_n, seed, offset, threshold, keep_scale, FEATURES, True, CAREFUL, WANT_DK,
            WANT_DV, MASK_GRAD, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, 1, PRECISION,
        )  # fmt: skip
        if MASK_GRAD:
            tl.store(mask_part_ptr + head.to(tl.int64) * N + cols, mask_grad, mask=cols < N)
    return dk, dv


@entry
def backward_key(
    q_ptr, k_ptr, v_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, cu_q, cu_k, dk_ptr, dv_ptr,
    mask_part_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_slope_b,
    stride_sb, stride_sh, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, M, N, H, GROUP,
    tiles_n, left, right, softmax_scale, scale, cap, seed, offset, threshold, keep_scale, FEATURES: tl.constexpr,
    ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, MASK_GRAD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """mask_part: [B, H, N], the sum over the queries. Under a causal mask the first keys are seen by the most queries,
    and their programs start first."""
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, ALIGN)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_gb, stride_gh, stride_gm = multiples(stride_gb, stride_gh, stride_gm, ALIGN)
    stride_dkb, stride_dkh, stride_dkn = multiples(stride_dkb, stride_dkh, stride_dkn, ALIGN)
    stride_dvb, stride_dvh, stride_dvn = multiples(stride_dvb, stride_dvh, stride_dvn, ALIGN)
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n = mask_strides(
        stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, MASK_ALIGN
    )
    tile = tl.program_id(0) % tiles_n
    outer = tl.program_id(0) // tiles_n
    b = outer // (H // GROUP)
    kv_head = outer % (H // GROUP)
    row0, M, col0, N, shift = sequence(cu_q, cu_k, b, M, N, FEATURES)
    first_j = tile * BLOCK_N
    if first_j >= N:
        return
    cols = tl.arange(0, BLOCK_N)
    b64, kv64 = b.to(tl.int64), kv_head.to(tl.int64)
    k_base = k_ptr + b64 * stride_kb + kv64 * stride_kh + col0.to(tl.int64) * stride_kn
    v_base = v_ptr + b64 * stride_vb + kv64 * stride_vh + col0.to(tl.int64) * stride_vn
    k = load_rows(k_base, first_j, cols, stride_kn, N, D, BLOCK_D, True)
    v = load_rows(v_base, first_j, cols, stride_vn, N, DV, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dk, dv = _heads(
        dk, dv, k, v, q_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, mask_part_ptr, stride_qb,
        stride_qh, stride_qm, stride_gb, stride_gh, stride_gm, stride_mask_b, stride_mask_h, stride_mask_m,
        stride_mask_n, stride_slope_b, stride_sb, stride_sh, b, kv_head, row0, first_j, M, N, shift, H, GROUP, left,
        right, scale, cap, seed, offset, threshold, keep_scale, FEATURES, False, True, True, MASK_GRAD, D, DV, BLOCK_D,
        BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, PRECISION,
    )  # fmt: skip
    if HIDES & FEATURES:
        # The NaN may come from a query that does not see the key. dv and dk are recomputed one at a time to save
        # registers.
        if has_nan(dv):
            dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
            dk, dv = _heads(
                dk, dv, k, v, q_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, mask_part_ptr,
                stride_qb, stride_qh, stride_qm, stride_gb, stride_gh, stride_gm, stride_mask_b, stride_mask_h,
                stride_mask_m, stride_mask_n, stride_slope_b, stride_sb, stride_sh, b, kv_head, row0, first_j, M, N,
                shift, H, GROUP, left, right, scale, cap, seed, offset, threshold, keep_scale, FEATURES, True, False,
                True, False, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, 1, PRECISION,
            )  # fmt: skip
        if has_nan(dk):
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dk, dv = _heads(
                dk, dv, k, v, q_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, mask_part_ptr,
                stride_qb, stride_qh, stride_qm, stride_gb, stride_gh, stride_gm, stride_mask_b, stride_mask_h,
                stride_mask_m, stride_mask_n, stride_slope_b, stride_sb, stride_sh, b, kv_head, row0, first_j, M, N,
                shift, H, GROUP, left, right, scale, cap, seed, offset, threshold, keep_scale, FEATURES, True, True,
                False, False, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, 1, PRECISION,
            )  # fmt: skip
    live = (first_j + cols < N)[:, None]
    j64 = col0.to(tl.int64) + first_j + cols
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    dk_rows = dk_ptr + b64 * stride_dkb + kv64 * stride_dkh + j64 * stride_dkn
    dv_rows = dv_ptr + b64 * stride_dvb + kv64 * stride_dvh + j64 * stride_dvn
    tl.store(dk_rows[:, None] + dims[None, :], dk * softmax_scale, mask=live & (dims < D)[None, :])
    tl.store(dv_rows[:, None] + dims_v[None, :], dv * keep_scale, mask=live & (dims_v < DV)[None, :])
