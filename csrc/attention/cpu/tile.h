// Products of attention: out[r][v] (+)= sum_k a(r, k) * b[k][v]. a is stored either as rows (k contiguous),
// multiplied by the micro-kernel of gemm/tile.h, or as columns (r contiguous). Queries fill the lanes, so
// keys and values are read in their own layout, by broadcasts, and softmax never sums across a vector.
// The order of every sum depends on K alone.
#pragma once

#include "gemm/tile.h"

DLK_ISA_BEGIN

// n rounded up to whole vectors.
template <class C>
DLK_INLINE int64_t lanes_rounded(int64_t n) {
  constexpr int64_t kSize = Vec<C>::size;
  return (n + kSize - 1) / kSize * kSize;
}

// Wide matrices are cut into strips of two or three vectors of columns: three are fastest, because their tiles load
// least for the same work. (One vector is one strip.)
DLK_INLINE int64_t strips(int64_t vectors) { return (vectors + 2) / 3; }
DLK_INLINE int64_t strip_begin(int64_t vectors, int64_t strip) { return vectors * strip / strips(vectors); }
DLK_INLINE int strip_width(int64_t vectors, int64_t strip) {
  return static_cast<int>(strip_begin(vectors, strip + 1) - strip_begin(vectors, strip));
}

// Tiles of nearly equal height for `rows` rows.
template <int kVectors>
struct Heights {
  int64_t tiles;
  int least, higher;  // the first `higher` tiles have a row more

  DLK_INLINE explicit Heights(int64_t rows) {
    const auto n = static_cast<uint32_t>(rows), count = (n + rows_for(kVectors) - 1) / rows_for(kVectors);
    tiles = count;
    least = static_cast<int>(count ? n / count : 0);
    higher = static_cast<int>(n) - least * static_cast<int>(count);
  }
  DLK_INLINE int of(int64_t tile) const { return least + (tile < higher); }
};

// out (+)= a b for a [rows][lda] and b [K][kVectors vectors], kVectors = 1..3. K = 0 writes (or adds) zeros.
template <class C, int kVectors>
DLK_INLINE void multiply_rows(int64_t rows, const C* a, int64_t lda, int64_t K, const C* b, C* out, int64_t ldo,
                              bool accumulate) {
  const Heights<kVectors> heights(rows);
  for (int64_t tile = 0; tile < heights.tiles; ++tile) {
    const int count = heights.of(tile);
    const C* row[kMaxRows];
    for (int r = 0; r < count; ++r, a += lda) row[r] = a;
    pick_tile<C, kVectors>(count, false)(row, K, b, 0, nullptr, out, ldo, accumulate);
    out += count * ldo;
  }
}

template <class C>
DLK_NOINLINE void multiply_rows(int64_t rows, int vectors, const C* a, int64_t lda, int64_t K, const C* b, C* out,
                                int64_t ldo, bool accumulate) {
  if (vectors == 2) return multiply_rows<C, 2>(rows, a, lda, K, b, out, ldo, accumulate);
  if (vectors == 1) return multiply_rows<C, 1>(rows, a, lda, K, b, out, ldo, accumulate);
  multiply_rows<C, 3>(rows, a, lda, K, b, out, ldo, accumulate);
}

template <class C>
using ColumnsTileFn = void (*)(const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb, C* out, int64_t ldo);

// out += a b for a [K][lda].
template <class C, int kRows, int kVectors>
DLK_NOINLINE void columns_tile(const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb, C* out, int64_t ldo) {
  using V = Vec<C>;
  const int64_t slice = slice_of(K);
  while (K > 0) {
    V acc[kRows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = V::zero();
    }
    const int64_t depth = K < slice + slice / 2 ? K : slice;
    for (int64_t k = 0; k < depth; ++k, a += lda, b += ldb) {
      __builtin_prefetch(a + 8 * lda);  // the hardware's prefetchers do not follow rows that are far apart
      V column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = V::load(b + v * V::size);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const V x = V::set1(a[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, column[v], acc[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        C* to = out + r * ldo + v * V::size;
        (V::load(to) + acc[r][v]).store(to);
      }
    }
    K -= depth;
  }
}

template <class C, int kVectors, int... kRow>
DLK_INLINE ColumnsTileFn<C> pick_columns_tile(int rows, std::integer_sequence<int, kRow...>) {
  static constexpr ColumnsTileFn<C> kTable[] = {columns_tile<C, kRow + 1, kVectors>...};
  return kTable[rows - 1];
}

template <class C, int kVectors>
DLK_INLINE void add_columns(int64_t rows, const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb, C* out,
                            int64_t ldo) {
  const Heights<kVectors> heights(rows);
  for (int64_t tile = 0; tile < heights.tiles; ++tile) {
    const int count = heights.of(tile);
    pick_columns_tile<C, kVectors>(count, std::make_integer_sequence<int, rows_for(kVectors)>{})(a, lda, K, b, ldb, out,
                                                                                                 ldo);
    a += count, out += count * ldo;
  }
}

// The same for any of 1..3 vectors.
template <class C>
DLK_NOINLINE void add_columns(int64_t rows, int vectors, const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb,
                              C* out, int64_t ldo) {
  if (vectors == 2) return add_columns<C, 2>(rows, a, lda, K, b, ldb, out, ldo);
  if (vectors == 1) return add_columns<C, 1>(rows, a, lda, K, b, ldb, out, ldo);
  add_columns<C, 3>(rows, a, lda, K, b, ldb, out, ldo);
}

// out += a b for tiles with masked elements and operands that are not all finite. Where the weight is 0,
// nothing is added, because 0 times NaN would be NaN. `Lies` tells whether a is stored as rows or columns.
enum class Lies { rows, columns };

template <class C, Lies kLies, bool kWeightsInA>
DLK_NOINLINE void add_selected(int64_t rows, int64_t width, const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb,
                               C* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < K; ++k) {
      const C x = kLies == Lies::rows ? a[r * lda + k] : a[k * lda + r];
      for (int64_t w = 0; w < width; ++w) {
        const C y = b[k * ldb + w];
        if ((kWeightsInA ? x : y) != 0) out[r * ldo + w] += x * y;
      }
    }
}

// out [rows][ldo] += a [rows][lda] b [K][ldo], where a holds weights and b is stored as strips one after the other.
// `selected` skips weights of 0 (add_selected).
template <class C>
DLK_NOINLINE void add_strips(bool selected, int64_t rows, const C* a, int64_t lda, int64_t K, const C* b, C* out,
                             int64_t ldo) {
  const int64_t vectors = ldo / Vec<C>::size;
  for (int64_t strip = 0; strip < strips(vectors); ++strip) {
    const int64_t first = strip_begin(vectors, strip) * Vec<C>::size;
    const int count = strip_width(vectors, strip);
    const C* from = b + first * K;
    if (selected) {
      const int64_t width = int64_t{count} * Vec<C>::size;
      add_selected<C, Lies::rows, true>(rows, width, a, lda, K, from, width, out + first, ldo);
    } else {
      multiply_rows(rows, count, a, lda, K, from, out + first, ldo, true);
    }
  }
}

// Whether all of a [rows][width] is finite.
template <class C>
DLK_NOINLINE bool all_finite(const C* a, int64_t lda, int64_t rows, int64_t width) {
  using V = Vec<C>;
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  for (int64_t r = 0; r < rows; ++r) {
    int part = 0;
    for (int64_t w = 0; w < width; w += V::size, part = (part + 1) % 4) {
      const int n = static_cast<int>(width - w < V::size ? width - w : V::size);
      sums[part] = fma(load_part(a + r * lda + w, n), V::zero(), sums[part]);
    }
  }
  const C sum = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return sum == 0;
}

DLK_ISA_END
