"""Pools the attention probabilities to a small picture, tile by tile and without an M x N tensor."""

import triton.language as tl

from dlkernels.attention.triton.kernels.elements import (
    ALIBI,
    ANY_MASK,
    LEFT,
    RIGHT,
    load_rows,
    mask_strides,
    multiples,
    power,
    scores,
    sequence,
    unit,
)  # fmt: skip
from dlkernels.attention.triton.kernels.entry import entry


@entry
def attention_map(
    q_ptr, k_ptr, stats_ptr, mask_ptr, slopes_ptr, out_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh,
    stride_kn, stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_slope_b, M, N, H, GROUP, picture_rows,
    picture_cols, left, right, scale, cap, FEATURES: tl.constexpr, ALIGN: tl.constexpr, MASK_ALIGN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program computes one cell. stats: contiguous [B, H, 2, M]; out: contiguous [B, H, rows, cols]."""
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    stride_qb, stride_qh, stride_qm = multiples(stride_qb, stride_qh, stride_qm, ALIGN)
    stride_kb, stride_kh, stride_kn = multiples(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n = mask_strides(
        stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, MASK_ALIGN
    )
    cells = picture_rows.to(tl.int64) * picture_cols
    outer = (tl.program_id(0) // cells).to(tl.int32)
    cell = (tl.program_id(0) % cells).to(tl.int32)
    r = cell // picture_cols
    c = cell % picture_cols
    b = outer // H
    h = outer % H
    _row0, M, _col0, N, shift = sequence(None, None, b, M, N, FEATURES)
    # Query i is in bin i * rows // M.
    i_begin = tl.cdiv(r.to(tl.int64) * M, picture_rows).to(tl.int32)
    i_end = tl.cdiv((r + 1).to(tl.int64) * M, picture_rows).to(tl.int32)
    j_begin = tl.cdiv(c.to(tl.int64) * N, picture_cols).to(tl.int32)
    j_end = tl.cdiv((c + 1).to(tl.int64) * N, picture_cols).to(tl.int32)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    q_base = q_ptr + b64 * stride_qb + h64 * stride_qh
    k_base = k_ptr + b64 * stride_kb + (h64 // GROUP) * stride_kh
    slope = 0.0
    if ALIBI & FEATURES:
        slope = tl.load(slopes_ptr + b64 * stride_slope_b + h64).to(tl.float32) * unit(EXACT)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first_i in range(i_begin, i_end, BLOCK_M):
        i = first_i + rows
        live = i < i_end
        q = load_rows(q_base, first_i, rows, stride_qm, i_end, D, BLOCK_D, True)
        stats = stats_ptr + outer.to(tl.int64) * (2 * M) + i
        top = tl.load(stats, mask=live, other=float("inf"))[:, None]
        weight = tl.load(stats + M, mask=live, other=0.0)
        mask_rows = mask_ptr
        if ANY_MASK & FEATURES:
            mask_rows = (mask_ptr + b64 * stride_mask_b + h64 * stride_mask_h + i.to(tl.int64) * stride_mask_m)[:, None]
        begin = j_begin
        end = j_end
        if RIGHT & FEATURES:
            end = tl.minimum(end, tl.minimum(first_i + BLOCK_M, i_end) + shift + right)
        if LEFT & FEATURES:
            begin = tl.maximum(begin, first_i + shift - left)
        for first_j in range(begin, end, BLOCK_N):
            k = load_rows(k_base, first_j, cols, stride_kn, end, D, BLOCK_D, True)
            s, _tanh = scores(
                tl.dot(q, tl.trans(k), input_precision=PRECISION), i[:, None], (first_j + cols)[None, :], live[:, None],
                end, shift, left, right, scale, cap, slope, mask_rows, stride_mask_n, FEATURES, True, EXACT,
            )  # fmt: skip
            total += tl.sum(power(s - top, EXACT), 1) * weight
    count = tl.maximum(i_end - i_begin, 1)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0) / count.to(tl.float32))
