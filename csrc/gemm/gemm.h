// Matrix products outside the recurrence: input projections, input gradients, weight
// gradients. C[m][n] = sum_k A[m][k] B[k][n] over packed panels of B (panels.h). A panel
// is fetched into L2 once for a whole block of rows of A; if K is so long that the panel
// would not stay in L2, it is taken in parts of kPanelDepth rows. The order of summation
// over k depends on K alone.
#pragma once

#include "core/team.h"
#include "gemm/operands.h"
#include "gemm/panels.h"

DLK_ISA_BEGIN

constexpr int kBlockRows = 384;
constexpr int kTransposedRows = 192;  // both multiples of every tile height and vector size
constexpr int64_t kPanelDepth = 1024;
static_assert(!kTiles || (kBlockRows % kMaxRows == 0 && kTransposedRows % kMaxRows == 0), "tiles are written whole");
static_assert(kPanelDepth % kDepthItems == 0);

// A source of blocks of A's rows: here rows that are used in place. `rows(m, count, out)`
// writes the addresses of `count` rows of operands, valid until the next call.
template <class C, class RowAt>
struct DirectRows {
  static constexpr int kRows = kBlockRows;
  RowAt row;
  void rows(int64_t m, int count, const C** out) const {
    for (int r = 0; r < count; ++r) out[r] = static_cast<const C*>(row(m + r));
  }
};

// Whether rows with this stride compete for the same few lines of L1.
template <class C>
DLK_INLINE bool collides(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(C)) % 2048 == 0;
}

// Copies rows into one block and converts them to operands. K is the number of values in a row, not of pairs.
template <class C, class RowAt>
struct CopiedRows {
  static constexpr int kRows = kBlockRows;
  RowAt row;
  DType dtype;
  int64_t K, ld;
  C* block;  // [kBlockRows][ld]
  void rows(int64_t m, int count, const C** out) const {
    for (int r = 0; r < count; ++r) {
      load_operands<C>(dtype, row(m + r), K, block + r * ld);
      out[r] = block + r * ld;
    }
  }
};

// Rows of float32 as quads. The scale of row m goes to scales[m].
template <class C, class RowAt>
struct QuantizedRows {
  static constexpr int kRows = kBlockRows;
  RowAt row;
  int64_t K, ld;
  C* block;  // [kBlockRows][ld]
  C* scales;
  void rows(int64_t m, int count, const C** out) const {
    for (int r = 0; r < count; ++r) {
      C* to = block + r * ld;
      scales[m + r] = Int8Quads<C>::quantize(static_cast<const C*>(row(m + r)), K, reinterpret_cast<uint8_t*>(to));
      out[r] = to;
    }
  }
};

// A is the transpose of src [K][>= m + count], row stride src_ld. With pairs and an odd K the last pair is filled up
// with 0.
template <class C>
struct TransposedRows {
  static constexpr int kRows = kTransposedRows;
  const Operand<C>* src;
  int64_t src_ld, K, ld;
  C* block;  // [kTransposedRows][ld]
  void rows(int64_t m, int count, const C** out) const {
    constexpr int kLanes = Vec<C>::size;
    for (int r0 = 0; r0 < count; r0 += kLanes) {
      const int columns = count - r0 < kLanes ? count - r0 : kLanes;
      for (int64_t k = 0; k < item_count(K); k += kLanes) {
        const Operand<C>* from = src + k * kItemValues * src_ld + m + r0;
        C* to = block + r0 * ld + k;  // ld leaves room for whole vectors
        if constexpr (kPairs) {
          Vec<C> pairs[kLanes];
          for (int p = 0; p < kLanes; ++p, from += 2 * src_ld) {
            const int64_t left = K - 2 * (k + p);
            pairs[p] = Unit<C>::pairs(from, left > 0 ? columns : 0, from + src_ld, left > 1 ? columns : 0);
          }
          transpose(pairs);
          for (int r = 0; r < columns; ++r) pairs[r].store(to + r * ld);
        } else {
          const int rows = static_cast<int>(K - k < kLanes ? K - k : kLanes);
          transpose_block(from, src_ld, rows, columns, to, ld);
        }
      }
    }
    for (int r = 0; r < count; ++r) out[r] = block + r * ld;
  }
};

// The stride of rows of K elements: it leaves room to store whole vectors over the end of each row.
template <class C>
DLK_INLINE int64_t block_ld(int64_t K) {
  constexpr int64_t kLanes = Vec<C>::size;
  return (K + kLanes - 1) / kLanes * kLanes + kLanes;
}

// The stride, in values, of rows of operands of n values, whose products read up to the end of the last item.
template <class C>
DLK_INLINE int64_t operand_ld(int64_t n) {
  return block_ld<C>(item_count(n)) * kItemValues;
}

// One vector of columns of the right-hand side.
struct GemmColumn {
  int64_t panel;
  int vector;
  int64_t column;  // the first of its columns
};

// Multiplies rows [m0, m1) by panels [p0, p1). sink(m, GemmColumn, value, n) gets n <= Vec::size results of row m.
// out(m, GemmColumn) is the address where the sink will store them: it is prefetched while the product is computed. If
// `direct` is given, [m][ld], panels without padding are stored there and the sink gets only the others.
template <class C, class Rows, class Out, class Sink>
DLK_INLINE void gemm(int64_t m0, int64_t m1, int64_t p0, int64_t p1, const Rows& a, const Panels<C>& b, Out out,
                     Sink sink, C* direct = nullptr, int64_t ld = 0) {
  using V = Vec<C>;
  const PanelShape& shape = b.shape();
  constexpr int kRows = Rows::kRows;
  alignas(64) C sums[kRows * kMaxVectors * V::size];
  const C* row[kRows];
  for (int64_t m = m0; m < m1; m += kRows) {
    const int block_rows = static_cast<int>(m1 - m < kRows ? m1 - m : kRows);
    a.rows(m, block_rows, row);
    for (int64_t p = p0; p < p1; ++p) {
      const Panel<C> panel = b.at(p);
      const int vectors = panel.vectors, width = vectors * V::size;
      const bool whole_panel = direct && shape.valid(p, vectors - 1) == V::size;
      Ahead<C> ahead;
      if (p + 1 < p1) ahead = b.ahead(p + 1, p + 2, block_rows);
      for (int64_t k = 0; k == 0 || k < shape.K; k += kPanelDepth) {  // once for K = 0 too: the results are zeros
        const int64_t depth = shape.K - k < kPanelDepth ? shape.K - k : kPanelDepth;
        for (int r = 0, rows; r < block_rows; r += rows) {
          rows = next_tile(block_rows - r, vectors);
          const bool whole = whole_panel && rows % kRowUnit == 0;  // a matrix unit would write the rows that follow too
          C* sum = whole                    ? direct + (m + r) * ld + shape.column(p, 0)
                   : shape.K <= kPanelDepth ? sums
                                            : sums + r * width;
          const C* part[kMaxRows];
          for (int i = 0; i < rows; ++i) {
            part[i] = row[r + i] + k;
            for (int v = 0; v < vectors; ++v)
              __builtin_prefetch(out(m + r + i, GemmColumn{p, v, shape.column(p, v)}), 1);
          }
          run_tile(rows, part, depth, panel.from(k), sum, whole ? ld : width, k > 0, ahead, [](int, int) {});
          if (whole || k + depth < shape.K) continue;
          for (int i = 0; i < rows; ++i)
            for (int v = 0; v < vectors; ++v)
              sink(m + r + i, GemmColumn{p, v, shape.column(p, v)}, V::load(sum + i * width + v * V::size),
                   shape.valid(p, v));
        }
      }
    }
  }
}

// A thread's share of M rows by all panels. It is a share of the panels if there are enough of them, so that each core
// streams its own part of B (or packs it on the fly, if `fresh`), else a share of the rows.
struct GemmShare {
  int64_t m0, m1, p0, p1;
  GemmShare(const Member& member, int64_t M, const PanelShape& shape, bool fresh)
      : m0(0), m1(M), p0(0), p1(shape.count()) {
    if (p1 >= (fresh ? 1 : 4) * member.size) {
      member.share(p1, 1, &p0, &p1);
    } else {
      member.share(M, kMaxRows, &m0, &m1);
    }
  }
};

DLK_ISA_END
