"""Gradient of an additive mask with a value per query and key: the sum of ds over the batch entries and heads that
share the mask. (Masks with one value per query or key get their gradient in the other passes.) One program computes a
tile of the gradient, so the sum has a fixed order, and nothing is as large as [B, H, M, N] unless the mask is."""

import triton.language as tl

from dlkernels.attention.triton.kernels.elements import (
    ALIBI,
    DROPOUT,
    LEFT,
    RIGHT,
    kept,
    load_rows,
    mask_strides,
    multiples,
    power,
    scores,
    sequence,
    stats_start,
    unit,
)  # fmt: skip
from dlkernels.attention.triton.kernels.entry import entry


@entry
def mask_gradient(
    q_ptr, k_ptr, v_ptr, do_ptr, top_ptr, weight_ptr, delta_ptr, mask_ptr, slopes_ptr, dmask_ptr, stride_qb, stride_qh,
    stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_slope_b, stride_sb, stride_sh, M, N, B, H, GROUP,
    tiles_m, tiles_n, left, right, scale, cap, seed, offset, threshold, keep_scale, FEATURES: tl.constexpr,
    ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr, PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The slowest-varying part of program_id counts the mask's own batch entries and heads. dmask: contiguous."""
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, ALIGN)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = multiples(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_gb, stride_gh, stride_gm = multiples(stride_gb, stride_gh, stride_gm, ALIGN)
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n = mask_strides(
        stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, MASK_ALIGN
    )
    i_first = tl.program_id(0) % tiles_m * BLOCK_M
    first_j = tl.program_id(0) // tiles_m % tiles_n * BLOCK_N
    slab = tl.program_id(0) // (tiles_m * tiles_n)
    b_begin = slab * 0
    b_end = b_begin + B
    h_begin = b_begin
    h_end = b_begin + H
    if PER_HEAD and PER_BATCH:
        b_begin = slab // H
        h_begin = slab % H
    elif PER_HEAD:
        h_begin = slab
    elif PER_BATCH:
        b_begin = slab
    if PER_BATCH:
        b_end = b_begin + 1
    if PER_HEAD:
        h_end = h_begin + 1
    row0, M, _col0, N, shift = sequence(None, None, b_begin, M, N, FEATURES)
    if RIGHT & FEATURES:
        b_end = tl.where(first_j > i_first + BLOCK_M - 1 + shift + right, b_begin, b_end)
    if LEFT & FEATURES:
        b_end = tl.where(first_j + BLOCK_N - 1 < i_first + shift - left, b_begin, b_end)

    tile_rows = tl.arange(0, BLOCK_M)
    tile_cols = tl.arange(0, BLOCK_N)
    rows = i_first + tile_rows
    cols = first_j + tile_cols
    live = rows < M
    i = rows[:, None]
    j = cols[None, :]
    dmask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(b_begin, b_end):
        b64 = tl.cast(b, tl.int64)
        for h in range(h_begin, h_end):
            h64 = tl.cast(h, tl.int64)
            kv64 = h64 // GROUP
            q = load_rows(q_ptr + b64 * stride_qb + h64 * stride_qh, i_first, tile_rows, stride_qm, M, D, BLOCK_D, True)
            k = load_rows(
                k_ptr + b64 * stride_kb + kv64 * stride_kh, first_j, tile_cols, stride_kn, N, D, BLOCK_D, True
            )
            slope = 0.0
            if ALIBI & FEATURES:
                slope = tl.load(slopes_ptr + b64 * stride_slope_b + h64).to(tl.float32) * unit(EXACT)
            mask_rows = (mask_ptr + b64 * stride_mask_b + h64 * stride_mask_h + rows.to(tl.int64) * stride_mask_m)[
                :, None
            ]
            s, _tanh = scores(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), i, j, live[:, None], N, shift, left, right, scale,
                cap, slope, mask_rows, stride_mask_n, FEATURES, True, EXACT,
            )  # fmt: skip
            stats = stats_start(b, h, row0, stride_sb, stride_sh, FEATURES) + rows
            p = power(s - tl.load(top_ptr + stats)[:, None], EXACT) * tl.load(weight_ptr + stats)[:, None]
            do = load_rows(
                do_ptr + b64 * stride_gb + h64 * stride_gh, i_first, tile_rows, stride_gm, M, DV, BLOCK_DV, True
            )
            v = load_rows(
                v_ptr + b64 * stride_vb + kv64 * stride_vh, first_j, tile_cols, stride_vn, N, DV, BLOCK_DV, True
            )
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if DROPOUT & FEATURES:
                keep = kept(i, first_j, b * H + h, seed, offset, threshold, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            delta = tl.load(delta_ptr + stats)[:, None]
            dmask += tl.where(s == float("-inf"), 0.0, p * (dp - delta))
    out = dmask_ptr + slab.to(tl.int64) * M * N + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out, dmask, mask=live[:, None] & (cols < N)[None, :])
