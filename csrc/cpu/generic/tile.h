// The one inner product kernel: out[r][v] (+)= sum_k a[r][k] * b[k][v] for a tile of a
// few rows and 1..4 vectors of columns that stays in registers.
//
// b has rows of that many columns, ldb apart: a packed panel, zero padded to whole vectors
// (panels.h), or a part of a matrix as it lies. Every output is a chain of FMAs in
// the order of k, cut into slices whose sums are added up in order: the rounding error of
// one long chain grows with its length. The order is the same for every height of the tile,
// so a row's result does not depend on the rows beside it.
// No include guard: included once per ISA, see docs/architecture.md.

constexpr int kMaxVectors = 4;

// Chosen by measuring the error against torch's own products: up to 128 one chain is as
// good as theirs, for the next sizes it takes slices of 64, and longer ones of 128 again.
constexpr int64_t slice_of(int64_t K) { return K > 128 && K <= 512 ? 64 : 128; }

// Rows of a tile by its vectors: accumulators plus operands must fit the registers.
constexpr int tile_rows(int vectors) {
  const int rows = (kRegisters == 32 ? 24 : 12) / vectors;
  return rows > 8 ? 8 : rows;
}

template <class C>
using TileFn = void (*)(const C* const* a, int64_t K, const C* b, int64_t ldb, C* out, bool accumulate);

template <class C, int kRows, int kVectors>
DLK_NOINLINE void tile(const C* const* a, int64_t K, const C* b, int64_t ldb, C* out, bool accumulate) {
  using V = Vec<C>;
  constexpr int kWidth = kVectors * V::size;
  V acc[kRows][kVectors];
  const C* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    row[r] = a[r];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = V::zero();
  }
  // A tall tile has the time to fetch its panel ahead from L2 or beyond; a low one would
  // only load the same lines twice.
  constexpr bool kFetchAhead = kRows * kVectors >= 16;
  for (int64_t k = 0; k < K; ++k, b += ldb) {
    V column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      column[v] = V::load(b + v * V::size);
      if constexpr (kFetchAhead && V::size * sizeof(C) == 64) __builtin_prefetch(b + 8 * ldb + v * V::size);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V x = V::set1(row[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, column[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      C* to = out + r * kWidth + v * V::size;
      if (accumulate) acc[r][v] = V::load(to) + acc[r][v];
      acc[r][v].store(to);
    }
  }
}

template <class C, int kVectors, int... kRow>
DLK_INLINE TileFn<C> pick_rows(int rows, std::integer_sequence<int, kRow...>) {
  static constexpr TileFn<C> kTable[] = {tile<C, kRow + 1, kVectors>...};
  return kTable[rows - 1];
}

template <class C, int kVectors>
DLK_INLINE TileFn<C> pick_tile(int rows) {
  return pick_rows<C, kVectors>(rows, std::make_integer_sequence<int, tile_rows(kVectors)>{});
}

template <class C>
DLK_INLINE void run_tile(int rows, int vectors, const C* const* a, int64_t K, const C* b, int64_t ldb, C* out,
                         bool accumulate) {
  TileFn<C> fn;
  switch (vectors) {
    case 1:
      fn = pick_tile<C, 1>(rows);
      break;
    case 2:
      fn = pick_tile<C, 2>(rows);
      break;
    case 3:
      fn = pick_tile<C, 3>(rows);
      break;
    default:
      fn = pick_tile<C, 4>(rows);
      break;
  }
  const C* at[8];
  for (int r = 0; r < rows; ++r) at[r] = a[r];
  const int64_t slice = slice_of(K);
  for (int64_t k = 0;;) {
    const int64_t left = K - k, depth = left < slice + slice / 2 ? left : slice;
    fn(at, depth, b + k * ldb, ldb, out, accumulate);
    k += depth;
    if (k >= K) break;
    for (int r = 0; r < rows; ++r) at[r] += depth;
    accumulate = true;
  }
}

// A tile's home between the product and what uses it: 1.5 KB that never leave L1.
template <class C>
struct alignas(64) TileBuffer {
  C data[8 * kMaxVectors * Vec<C>::size];
};
