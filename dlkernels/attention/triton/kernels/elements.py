"""The elementwise work on the scores between the two products of attention, which all kernels, forward and backward,
share.

The caller chooses the shapes: `i` (query), `j` (key) and the values that belong to a query broadcast against the tile,
so the same code serves tiles [queries, keys] and [keys, queries].

Scores of 16-bit operands are in base 2, with log2(e) in the scale, because exp2 is a machine instruction. Scores of
float32 operands (EXACT) are in base e: the rounding of log2(e) in the scale would be the largest of all errors, and the
additional multiplication costs nothing beside float32's products.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32

# Bits of the kernels' FEATURES argument.
SOFTCAP = tl.constexpr(1)
ALIBI = tl.constexpr(2)
BOOL_MASK = tl.constexpr(4)
FLOAT_MASK = tl.constexpr(8)
DROPOUT = tl.constexpr(16)
SINKS = tl.constexpr(32)
LEFT = tl.constexpr(64)  # the window has a left edge, which hides keys too far before their query
RIGHT = tl.constexpr(128)  # it has a right edge, which hides keys too far after their query; causal: at distance 0
VARLEN = tl.constexpr(256)
BOTTOM_RIGHT = tl.constexpr(512)  # the last query has the position of the last key
SIGNED_SCALE = tl.constexpr(1024)  # the scale is negative: the largest product is not the largest score

# Spare rows of statistics and delta after each sequence (two tiles), so that the backward passes can load ahead without
# a bounds check.
SPARE = tl.constexpr(256)

# The strides of statistics and delta are multiples of this.
STATS_ALIGN = tl.constexpr(4)

# The most queries and keys of a tile where NaN of hidden elements is left out (`product`, CAREFUL). With these few the
# three sums of width 256 fit the registers. With the tile of the usual path they would spill, and on sm_90 the products
# of the usual path would be serialised.
REPAIR = tl.constexpr(32)

ANY_MASK = tl.constexpr(4 | 8)
# With these features a score is more than the product times the scale.
CHANGES_SCORES = tl.constexpr(SOFTCAP.value | ALIBI.value | ANY_MASK.value | SIGNED_SCALE.value)
# With these features a key within bounds may be hidden from a query, which then must not see a NaN of the key.
HIDES = tl.constexpr(4 | 8 | 64 | 128)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh without libdevice, which the interpreter lacks. With EXACT, for float32, it is accurate to an ulp or two
    near 0 as well."""
    size = tl.abs(x)
    e = tl.exp2(size * (-2 * LOG2E))
    y = (1 - e) / (1 + e)
    y = tl.where(x < 0, -y, y)
    if EXACT:
        # 1 - e cancels near 0, so this is the minimax polynomial of Cephes' tanhf.
        z = x * x
        near = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        y = tl.where(size < 0.625, (near - 3.33332819422e-1) * z * x + x, y)
    return y


@triton.jit
def unit(EXACT: tl.constexpr):
    """One nat in the units of the scores."""
    if EXACT:
        return 1.0
    else:
        return LOG2E


@triton.jit
def power(x, EXACT: tl.constexpr):
    """exp of a score that is given in the units of the scores."""
    if EXACT:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def bias(mask, EXACT: tl.constexpr):
    """A mask's values in the units of the scores. In base 2 a large value may overflow float32. A finite value must
    stay finite, because -inf hides a key and inf turns its row into NaN."""
    if EXACT:
        return mask
    else:
        within = tl.minimum(tl.maximum(mask * LOG2E, -LARGEST), LARGEST)
        return tl.where(tl.abs(mask) < float("inf"), within, mask)


@triton.jit
def load_sink(ptr):
    """A sink of any dtype, converted to float32 such that a finite value stays finite."""
    given = tl.load(ptr)
    sink = given.to(tl.float32)
    within = tl.minimum(tl.maximum(sink, -LARGEST), LARGEST)
    return tl.where(tl.abs(given) < float("inf"), within, sink)


@triton.jit
def sink_score(sink, EXACT: tl.constexpr):
    """A sink in the units of the scores; a finite value stays finite."""
    if EXACT:
        return sink
    else:
        scaled = sink * LOG2E
        within = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
        return tl.where(tl.abs(sink) < float("inf"), within, scaled)


@triton.jit
def start_with_sink(m, l, sink, EXACT: tl.constexpr):
    """Adds the sink, a key without a value, to a row whose keys have the largest score `m` and the sum `l`. Returns the
    new largest score, the new sum, and the factor for what was accumulated before."""
    top = tl.maximum(m, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = power(m - base, EXACT)
    return top, l * shrink + power(sink - base, EXACT), shrink


@triton.jit
def store_statistics(stats, lse, plane, m, l, sink, natural_sink, live, EXACT: tl.constexpr):
    """Stores the two statistics from which the backward recomputes a row's probabilities, p = power(s - top) * weight,
    and the log-sum-exp. The statistics are not combined into one, because the logarithm of the sum would be lost to
    rounding beside a large score. In rows that see no key they are +inf and 0."""
    empty = l == 0.0
    total = tl.where(empty, 1.0, l)
    tl.store(stats, tl.where(empty, float("inf"), m), mask=live)
    tl.store(stats + plane, tl.where(empty, 0.0, 1.0 / total), mask=live)
    if EXACT:
        natural = m
    else:
        natural = tl.where(m == sink, natural_sink, m * LN2)
    tl.store(lse, tl.where(empty, float("-inf"), natural + tl.log2(total) * LN2), mask=live)


@triton.jit
def scores(
    dots, i, j, live, N, shift, left, right, scale, cap, slope, mask_rows, mask_stride, FEATURES: tl.constexpr,
    EDGE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Returns (scores, tanh): the logits, -inf if the key is hidden, and the softcap's tanh, for its derivative.

    `live`: the query exists. EDGE: the tile may cross the end of the keys or the edge of the causal triangle or the
    window; without it only a mask hides keys. With a softcap `scale` is softmax_scale / softcap and `cap` is the
    softcap in the units of the scores. Without one `scale` is softmax_scale in these units. `slope` is always in these
    units.
    """
    s = dots * scale
    t = s
    if SOFTCAP & FEATURES:
        t = tanh(s, EXACT)
        s = t * cap
    if ALIBI & FEATURES:
        s -= slope * tl.abs(i + shift - j).to(tl.float32)
    if EDGE:
        seen = live & (j < N)
        if RIGHT & FEATURES:
            seen = seen & (j <= i + shift + right)
        if LEFT & FEATURES:
            seen = seen & (j >= i + shift - left)
    if ANY_MASK & FEATURES:
        # Only the bounds limit this load. The `where` below drops what the triangle or the window hides, even if NaN.
        # Whole tiles end before N; without that comparison their load is vectorised.
        there = live
        if EDGE:
            there = there & (j < N)
        mask = tl.load(mask_rows + j.to(tl.int64) * mask_stride, mask=there, other=0)
        if BOOL_MASK & FEATURES:
            visible = mask != 0
        else:
            mask = mask.to(tl.float32)
            s += bias(mask, EXACT)
            visible = mask != float("-inf")
        if EDGE:
            seen = seen & visible
        else:
            seen = visible
    if EDGE or (ANY_MASK & FEATURES):
        s = tl.where(seen, s, float("-inf"))
    return s, t


@triton.jit
def kept(i, first_j, head, seed, offset, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether dropout keeps each element, [BLOCK_M, BLOCK_N]. `i` and `head` are [BLOCK_M, 1] or scalars, and first_j
    is a multiple of 4.

    The result depends only on seed, offset, head, query and key, so every tiling and both passes have the same mask.
    One call of the generator gives the words of four neighbouring keys.
    """
    quads = (first_j // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = tl.philox(seed, quads, i, head, offset.to(tl.uint32))
    limit = threshold.to(tl.uint32)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [BLOCK_M, BLOCK_N]) != 0


@triton.jit
def multiples(a, b, c, BY: tl.constexpr):
    """The same three strides, from which the compiler learns that BY divides them, as it must. Where rows and the
    tensor's start are multiples of 16 bytes, loads and stores take 16 bytes at a time."""
    return a // BY * BY, b // BY * BY, c // BY * BY


@triton.jit
def mask_strides(stride_b, stride_h, stride_m, stride_n, ALIGN: tl.constexpr):
    """The strides of a mask. ALIGN is 0 if neighbouring keys are not neighbours in memory; otherwise it divides the
    other three strides."""
    if ALIGN == 0:
        return stride_b, stride_h, stride_m, stride_n
    else:
        return stride_b // ALIGN * ALIGN, stride_h // ALIGN * ALIGN, stride_m // ALIGN * ALIGN, 1


@triton.jit
def load_rows(base, first, rows, stride, end, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Rows first + rows of a matrix as [len(rows), BLOCK], zero beyond `end` (checked only with EDGE) and WIDTH."""
    cols = tl.arange(0, BLOCK)
    if base.dtype.element_ty == tl.float32:
        # Offsets within a tile fit 32 bits, which leaves registers for the products.
        pointers = base + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    else:
        # With the sum above Triton 3.6 waits for each wgmma on sm_90 before the next one.
        pointers = base + (first + rows)[:, None].to(tl.int64) * stride + cols[None, :]
    if EDGE and WIDTH < BLOCK:
        return tl.load(pointers, mask=(first + rows < end)[:, None] & (cols < WIDTH)[None, :], other=0.0)
    elif EDGE:
        return tl.load(pointers, mask=(first + rows < end)[:, None], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(pointers, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def product(p, x, acc, seen, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p @ x. With CAREFUL, a NaN or infinity in x counts only where `seen`. In the plain product it counts
    everywhere, because p is 0 elsewhere but 0 * NaN is NaN. A kernel recomputes with CAREFUL if the plain product gave
    NaN."""
    if CAREFUL:
        clean = tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype)
        acc = tl.dot(p.to(x.dtype), clean, acc, input_precision=PRECISION)
        nan = x != x
        where = seen.to(x.dtype)
        zero = tl.zeros_like(acc)
        up = tl.dot(where, ((x == float("inf")) | nan).to(x.dtype), zero, input_precision=PRECISION)
        down = tl.dot(where, ((x == float("-inf")) | nan).to(x.dtype), zero, input_precision=PRECISION)
        return acc + tl.where(up > 0, float("inf"), 0.0) + tl.where(down > 0, float("-inf"), 0.0)
    else:
        return tl.dot(p.to(x.dtype), x, acc, input_precision=PRECISION)


@triton.jit
def has_nan(x):
    # The tensor is flattened, because two reductions in a row crash Triton 3.6's compiler for compute capability 10.0.
    return tl.max(tl.reshape((x != x).to(tl.int32), [x.shape[0] * x.shape[1]]), 0) > 0


@triton.jit
def sequence(cu_q, cu_k, b, M, N, FEATURES: tl.constexpr):
    """(first query row, M, first key row, N, shift) of batch entry b; the position of query i is i + shift."""
    if VARLEN & FEATURES:
        row0 = tl.load(cu_q + b)
        rows = tl.load(cu_q + b + 1) - row0
        col0 = tl.load(cu_k + b)
        cols = tl.load(cu_k + b + 1) - col0
    else:
        row0 = b * 0
        rows = row0 + M
        col0 = b * 0
        cols = col0 + N
    if BOTTOM_RIGHT & FEATURES:
        shift = cols - rows
    else:
        shift = row0 * 0
    return row0, rows, col0, cols, shift


@triton.jit
def stats_start(b, h, row0, stride_b, stride_h, FEATURES: tl.constexpr):
    """Where the sequence's rows of statistics and delta begin, in the layout that `preprocess` writes. Without
    cu_seqlens that is a multiple of STATS_ALIGN, so that rows are loaded 16 bytes at a time."""
    aligned_b, aligned_h, _none = multiples(stride_b, stride_h, 0, STATS_ALIGN)
    start = tl.cast(b, tl.int64) * aligned_b + tl.cast(h, tl.int64) * aligned_h
    if VARLEN & FEATURES:
        start += row0
    return start


@triton.jit
def _whole_or_none(begin, full_begin, full_end, end):
    # If no tile is whole, the loop after that over whole tiles takes the whole range.
    full_begin = tl.maximum(full_begin, begin)
    any_whole = full_begin < full_end
    return begin, tl.where(any_whole, full_begin, begin), tl.where(any_whole, full_end, begin), end


@triton.jit
def key_range(i_first, i_last, N, shift, left, right, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full_begin, full_end, end) of the keys that queries i_first..i_last see.

    All but `end` are multiples of BLOCK_N. Each of these queries sees all keys in [full_begin, full_end); tiles outside
    of it need EDGE. Tiles before full_begin exist only if the window has a left edge.
    """
    begin = N * 0
    full_begin = begin
    end = N
    full_end = N
    if RIGHT & FEATURES:
        end = tl.minimum(N, tl.maximum(i_last + shift + right + 1, 0))
        full_end = tl.minimum(N, tl.maximum(i_first + shift + right + 1, 0))
    if LEFT & FEATURES:
        begin = tl.maximum(i_first + shift - left, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(i_last + shift - left, 0), BLOCK_N) * BLOCK_N
    return _whole_or_none(begin, full_begin, full_end // BLOCK_N * BLOCK_N, end)


@triton.jit
def query_range(j_first, j_last, M, N, shift, left, right, FEATURES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The same for the queries that see one of the keys j_first..j_last of a tile; j_last may be beyond N.

    Here tiles before full_begin exist only if the window has a right edge, such as the causal diagonal.
    """
    begin = M * 0
    full_begin = begin
    end = M
    full_end = tl.where(j_last < N, M, 0)
    if RIGHT & FEATURES:
        begin = tl.maximum(j_first - right - shift, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(j_last - right - shift, 0), BLOCK_M) * BLOCK_M
    if LEFT & FEATURES:
        end = tl.minimum(M, tl.maximum(tl.minimum(j_last, N - 1) + left - shift + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(j_first + left - shift + 1, 0))
    return _whole_or_none(begin, full_begin, full_end // BLOCK_M * BLOCK_M, end)
