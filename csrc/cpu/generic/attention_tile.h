// Products of attention: out[r][v] (+)= sum_k a(r, k) * b[k][v], like tile.h, but a lies either
// way round: rows (k contiguous) or columns (r contiguous). Queries fill the lanes, so keys and
// values are read as they lie, by broadcasts, and softmax never sums across a vector.
// The order of every sum depends on K alone.

// n rounded up to whole vectors.
template <class C>
DLK_INLINE int64_t lanes_rounded(int64_t n) {
  constexpr int64_t kSize = Vec<C>::size;
  return (n + kSize - 1) / kSize * kSize;
}

enum class Lies { rows, columns };

template <class C>
using AttentionTileFn = void (*)(const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb, C* out, int64_t ldo,
                                 bool accumulate);

template <class C, Lies kLies, int kRows, int kVectors>
DLK_NOINLINE void attention_tile(const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb, C* out, int64_t ldo,
                                 bool accumulate) {
  using V = Vec<C>;
  V acc[kRows][kVectors];
  const C* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = kLies == Lies::rows ? a + r * lda : a + r;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V::zero();
  }
  for (int64_t k = 0; k < K; ++k, b += ldb) {
    V column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = V::load(b + v * V::size);
    const int64_t at = kLies == Lies::rows ? k : k * lda;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V x = V::set1(kLies == Lies::rows ? row[r][at] : a[at + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, column[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      C* to = out + r * ldo + v * V::size;
      if (accumulate) acc[r][v] = V::load(to) + acc[r][v];
      acc[r][v].store(to);
    }
  }
}

template <class C, Lies kLies, int kVectors, int... kRow>
DLK_INLINE AttentionTileFn<C> attention_tile_of(int rows, std::integer_sequence<int, kRow...>) {
  static constexpr AttentionTileFn<C> kTable[] = {attention_tile<C, kLies, kRow + 1, kVectors>...};
  return kTable[rows - 1];
}

template <class C, Lies kLies>
DLK_INLINE AttentionTileFn<C> attention_tile_of(int rows, int vectors) {
  switch (vectors) {
    case 1:
      return attention_tile_of<C, kLies, 1>(rows, std::make_integer_sequence<int, tile_rows(1)>{});
    case 2:
      return attention_tile_of<C, kLies, 2>(rows, std::make_integer_sequence<int, tile_rows(2)>{});
    case 3:
      return attention_tile_of<C, kLies, 3>(rows, std::make_integer_sequence<int, tile_rows(3)>{});
    default:
      return attention_tile_of<C, kLies, 4>(rows, std::make_integer_sequence<int, tile_rows(4)>{});
  }
}

// rows by `vectors` vectors, 1..4. K = 0 writes (or adds) zeros.
template <class C, Lies kLies>
DLK_INLINE void multiply(int64_t rows, int vectors, const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb, C* out,
                         int64_t ldo, bool accumulate) {
  const int64_t slice = slice_of(K);
  const int height = tile_rows(vectors);
  for (int64_t r = 0; r < rows; r += height) {
    const int count = static_cast<int>(rows - r < height ? rows - r : height);
    const AttentionTileFn<C> fn = attention_tile_of<C, kLies>(count, vectors);
    const C* from = kLies == Lies::rows ? a + r * lda : a + r;
    bool add = accumulate;
    for (int64_t k = 0;;) {
      const int64_t left = K - k, depth = left < slice + slice / 2 ? left : slice;
      fn(from + (kLies == Lies::rows ? k : k * lda), lda, depth, b + k * ldb, ldb, out + r * ldo, ldo, add);
      k += depth;
      if (k >= K) break;
      add = true;
    }
  }
}

// The product of weights, which are probabilities or their gradients, with b [K][ldb], its columns cut
// to tiles; the weights are a.
template <class C, Lies kLies>
DLK_INLINE void multiply_wide_rows(int64_t rows, const C* a, int64_t lda, int64_t K, const C* b, int64_t ldb, C* out,
                                   int64_t ldo) {
  const int64_t vectors = ldo / Vec<C>::size, parts = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = vectors * part / parts, count = vectors * (part + 1) / parts - first;
    multiply<C, kLies>(rows, static_cast<int>(count), a, lda, K, b + first * Vec<C>::size, ldb,
                       out + first * Vec<C>::size, ldo, true);
  }
}

// out += a b for tiles with masked elements and something in them that is not finite: where the weight
// is 0 nothing is added, while 0 times NaN would be NaN.
template <class C, Lies kLies, bool kWeightsInA>
DLK_NOINLINE void multiply_selected(int64_t rows, int64_t width, const C* a, int64_t lda, int64_t K, const C* b,
                                    int64_t ldb, C* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < K; ++k) {
      const C x = kLies == Lies::rows ? a[r * lda + k] : a[k * lda + r];
      for (int64_t w = 0; w < width; ++w) {
        const C y = b[k * ldb + w];
        if ((kWeightsInA ? x : y) != 0) out[r * ldo + w] += x * y;
      }
    }
}

// All of rows x width finite?
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
