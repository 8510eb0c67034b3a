// The micro-kernel of matrix products: out[r][v] (+)= sum_k a[r][k] * b[k][v] for a register
// tile of a few rows and 1..4 vectors of columns; b is a packed panel.
//
// Every output is a chain of multiply-adds in the order of k, cut into slices whose sums are added
// up in order, because the rounding error of one long chain grows with its length. The order is the
// same for every shape of the tile, so a row's result does not depend on the rows beside it.
//
// With kPairs an item along K is a pair of bf16 values, as the bits of a float: operands have half as many items as
// values, and each multiply-add adds two products. With kQuads it is four bytes, a is unsigned, b is signed, and the
// sums are int32, as the bits of floats too; they are exact modulo 2^32. With kTiles a matrix unit makes the products
// (factors_of below): K is a whole number of its depths, and operands are filled up with zeros.
#pragma once

#include <type_traits>
#include <utility>

#include "gemm/storage_access.h"
#include "simd/int8_quads.h"

DLK_ISA_BEGIN

constexpr int kItemValues = kPairs ? 2 : kQuads ? 4 : 1;
// The type of the values of which operands consist.
template <class C>
using Operand = std::conditional_t<kPairs, bf16, std::conditional_t<kQuads, uint8_t, C>>;
// The items of a row of operands.
template <class C>
DLK_INLINE const C* items_of(const Operand<C>* row) {
  return reinterpret_cast<const C*>(row);
}
// The items that the product of n values takes; those beyond the values are 0.
constexpr int64_t kDepthItems = kTiles ? 16 : 1;
DLK_INLINE int64_t item_count(int64_t n) {
  constexpr int64_t kWhole = kDepthItems * kItemValues;
  return (n + kWhole - 1) / kWhole * kDepthItems;
}

// The type in which panels hold the items of a right-hand side.
template <class C>
using Stored = std::conditional_t<kWeights == Weights::bf16, bf16,
                                  std::conditional_t<kWeights == Weights::int8 && !kQuads, int8_t, C>>;

// Bf16Unit as a name that depends on C, so that its members are looked up only in code that is instantiated.
template <class C>
struct UnitOf {
  using type = Bf16Unit;
};
template <class C>
using Unit = typename UnitOf<C>::type;

template <class C>
DLK_INLINE Vec<C> multiply_add(Vec<C> a, Vec<C> b, Vec<C> sum) {
  if constexpr (kPairs) {
    return Unit<C>::dot(a, b, sum);
  } else if constexpr (kQuads) {
    return Int8Quads<C>::dot(a, b, sum);
  } else {
    return fma(a, b, sum);
  }
}

template <class C>
DLK_INLINE Vec<C> add_sums(Vec<C> a, Vec<C> b) {
  if constexpr (kQuads) {
    return Int8Quads<C>::add(a, b);
  } else {
    return a + b;
  }
}

// The length of a slice. It was chosen by measuring the error against that of torch's own products:
// up to K = 128 one chain is as exact as torch, up to 512 slices of 64 are, and beyond slices of 128.
constexpr int64_t slice_of(int64_t K) { return K > 128 && K <= 512 ? 64 : 128; }

// A panel has up to four vectors of columns and is stored as strips, each
// [K][strip_vectors * Vec::size]. Four vectors are two strips: tiles of many rows take one
// strip after the other, because a tall tile reads less of b for the same work; tiles of few
// rows take both at once, because they need that many independent sums.
constexpr int kMaxVectors = 4;
constexpr int kMaxRows = kTiles ? 32 : 12;
// A matrix unit takes as long for one row as for sixteen. Quads of up to this many rows go without it.
constexpr int kRowsWithoutUnit = kTiles && kQuads ? 4 : 0;
constexpr int strip_vectors(int vectors) { return vectors == 4 ? 2 : vectors; }

// A matrix unit reads and writes kRowUnit rows at a time, of which those beyond the last one hold anything. Memory with
// rows of operands has kSpareRows more of them.
constexpr int kRowUnit = kTiles ? 16 : 1;
constexpr int kSpareRows = kTiles ? kMaxRows - 1 : 0;
constexpr int whole_rows(int rows) { return (rows + kRowUnit - 1) / kRowUnit * kRowUnit; }

// The tallest tile of a strip: its sums take three quarters of the registers and leave the others to operands.
constexpr int rows_for(int vectors) {
  constexpr int kMost = kTiles ? kRowsWithoutUnit : kMaxRows;
  const int rows = kRegisters / 4 * 3 / vectors;
  return rows > kMost ? kMost : rows;
}

// The height of the next tile of a panel with `vectors` vectors, if n rows are left; all tiles get nearly equal
// heights, but those of a matrix unit are filled.
DLK_INLINE int next_tile(int64_t n, int vectors) {
  if (kTiles) return static_cast<int>(n < kMaxRows ? n : kMaxRows);
  const int height = rows_for(strip_vectors(vectors));
  const int64_t tiles = (n + height - 1) / height;
  return static_cast<int>((n + tiles - 1) / tiles);
}

// `next` is the distance to b's second strip, if the tile takes two. With kBring the tile also prefetches K cache lines
// from `ahead` on into L2.
template <class C>
using TileFn = void (*)(const C* const* a, int64_t K, const Stored<C>* b, int64_t next, const Stored<C>* ahead, C* out,
                        int64_t ldo, bool accumulate);

template <class C, int kRows, int kVectors, bool kBring>
DLK_NOINLINE void tile(const C* const* a, int64_t K, const Stored<C>* b, int64_t next, const Stored<C>* ahead, C* out,
                       int64_t ldo, bool accumulate) {
  using V = Vec<C>;
  constexpr int kStrip = strip_vectors(kVectors);
  // A tall tile has the time to prefetch its strips from L2 or beyond; a low one would only
  // load the same lines twice.
  constexpr bool kFetchAhead = kRows * kVectors >= 16 && V::size * sizeof(C) == 64;
  constexpr int kAhead = 8 * kStrip * V::size, kLine = 64 / sizeof(Stored<C>);
  const C* row[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) row[r] = a[r];
  const int64_t slice = slice_of(K);
  do {
    V acc[kRows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = V::zero();
    }
    const int64_t depth = K < slice + slice / 2 ? K : slice;
    // Counting up to 0 saves the register for the bound: the pointers of twelve rows leave none free.
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) row[r] += depth;
    for (int64_t k = -depth; k != 0; ++k, b += kStrip * V::size) {
      if constexpr (kBring) __builtin_prefetch(ahead, 0, 2), ahead += kLine;
      V column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Stored<C>* from = v < kStrip ? b + v * V::size : b + next + (v - kStrip) * V::size;
        column[v] = load_as<C>(from);
        if constexpr (kFetchAhead) __builtin_prefetch(from + kAhead);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const V x = V::set1(row[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = multiply_add(x, column[v], acc[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        C* to = out + r * ldo + v * V::size;
        if (accumulate) acc[r][v] = add_sums(V::load(to), acc[r][v]);
        acc[r][v].store(to);
      }
    }
    accumulate = true;
    K -= depth;
  } while (K > 0);
}

// Only a tall tile has the time to prefetch from `ahead`.
template <class C, int kVectors, bool kBring, int... kRow>
DLK_INLINE TileFn<C> pick_rows(int rows, std::integer_sequence<int, kRow...>) {
  static constexpr TileFn<C> kTable[] = {tile < C, kRow + 1, kVectors, kBring && (kRow + 1) * kVectors >= 16 > ...};
  return kTable[rows - 1];
}

template <class C, int kVectors>
DLK_INLINE TileFn<C> pick_tile(int rows, bool bring) {
  constexpr std::make_integer_sequence<int, rows_for(kVectors)> kHeights{};
  return bring ? pick_rows<C, kVectors, true>(rows, kHeights) : pick_rows<C, kVectors, false>(rows, kHeights);
}

// One panel of a right-hand side, or what is left of it from row k on.
template <class C>
struct Panel {
  const Stored<C>* data;
  int64_t next;  // from strip to strip
  int vectors;
  Panel from(int64_t k) const { return {data + k * strip_vectors(vectors) * Vec<C>::size, next, vectors}; }
};

// Memory that will be needed soon: tiles prefetch it into L2, K lines each, while they compute.
template <class C>
struct Ahead {
  const Stored<C>*at = nullptr, *end = nullptr;
  // Null when all of it has been taken.
  const Stored<C>* take(int64_t K) {
    if (at >= end) return nullptr;
    const Stored<C>* here = at;
    at += K * (64 / static_cast<int64_t>(sizeof(Stored<C>)));
    return here;
  }
};

// What a matrix unit multiplies: rows with equal distances, of which those from the last one on up to a whole number of
// kRowUnit are read (and written to `out`) too.
template <class C>
DLK_INLINE auto factors_of(int rows, const C* const* a, int64_t K, const Panel<C>& panel) {
  const int64_t lda = rows > 1 ? (a[1] - a[0]) * 2 : 0;  // an item takes the place of two bf16 values
  return typename Unit<C>::Factors{reinterpret_cast<const bf16*>(a[0]), lda, panel.data, panel.next, K};
}

template <class C, class Before>
DLK_INLINE void register_tile(int rows, const C* const* a, int64_t K, const Panel<C>& panel, C* out, int64_t ldo,
                              bool accumulate, Ahead<C>& ahead, Before before) {
  if (panel.vectors == 4 && rows > rows_for(4)) {
    for (int part = 0; part < 2; ++part, out += 2 * Vec<C>::size) {
      before(part, 2);
      const Stored<C>* bring = ahead.take(K);
      pick_tile<C, 2>(rows, bring)(a, K, panel.data + part * panel.next, 0, bring, out, ldo, accumulate);
    }
    return;
  }
  const Stored<C>* bring = ahead.take(K);
  TileFn<C> fn;
  switch (panel.vectors) {
    case 1:
      fn = pick_tile<C, 1>(rows, bring);
      break;
    case 2:
      fn = pick_tile<C, 2>(rows, bring);
      break;
    case 3:
      fn = pick_tile<C, 3>(rows, bring);
      break;
    default:
      fn = pick_tile<C, 4>(rows, bring);
      break;
  }
  before(0, 1);
  fn(a, K, panel.data, panel.next, bring, out, ldo, accumulate);
}

// out [rows][ldo] (+)= a [rows][K] times the panel. before(part, parts) is called before each part of the work: it may
// prefetch a few lines of the operands that the epilogue will combine with the results.
template <class C, class Before>
DLK_INLINE void run_tile(int rows, const C* const* a, int64_t K, const Panel<C>& panel, C* out, int64_t ldo,
                         bool accumulate, Ahead<C>& ahead, Before before) {
  if constexpr (kTiles) {
    if (rows > kRowsWithoutUnit) {
      before(0, 1);
      const auto factors = factors_of(rows, a, K, panel);
      return Unit<C>::template multiply_panel<kQuads>(rows, panel.vectors, &factors, 1, out, ldo, accumulate);
    }
  }
  if constexpr (kRowsWithoutUnit > 0 || !kTiles) register_tile(rows, a, K, panel, out, ldo, accumulate, ahead, before);
}

// The same with rows of out that follow each other without a gap.
template <class C, class Before>
DLK_INLINE void run_tile(int rows, const C* const* a, int64_t K, const Panel<C>& panel, C* out, bool accumulate,
                         Ahead<C>& ahead, Before before) {
  run_tile(rows, a, K, panel, out, int64_t{panel.vectors} * Vec<C>::size, accumulate, ahead, before);
}

// out = x times x_panel + a times panel: rows that follow each other without a gap.
template <class C, class Before>
DLK_INLINE void run_two_tiles(int rows, const C* const* x, int64_t x_K, const Panel<C>& x_panel, Ahead<C>& x_ahead,
                              const C* const* a, int64_t K, const Panel<C>& panel, Ahead<C>& ahead, C* out,
                              Before before) {
  if constexpr (kTiles) {
    before(0, 1);
    const typename Unit<C>::Factors both[] = {factors_of(rows, x, x_K, x_panel), factors_of(rows, a, K, panel)};
    Unit<C>::template multiply_panel<kQuads>(rows, panel.vectors, both, 2, out, int64_t{panel.vectors} * Vec<C>::size,
                                             false);
  } else {
    run_tile(rows, x, x_K, x_panel, out, false, x_ahead, [](int, int) {});
    run_tile(rows, a, K, panel, out, true, ahead, before);
  }
}

// Brings rows of `a` that other cores have just written into the cache of this core. Plain loads fetch many lines at
// once; the product, which takes its rows element by element, would wait for one line after the other, and prefetches
// are served more slowly.
template <class C>
DLK_INLINE void collect(int rows, const C* const* a, int64_t K) {
  for (int r = 0; r < rows; ++r)
    for (int64_t k = 0; k < K; k += 64 / static_cast<int64_t>(sizeof(C)))
      static_cast<void>(*static_cast<const volatile C*>(a[r] + k));
}

// Holds the results of a tile between the product and the code that uses them: 3 KB, which stay in L1 (8 KB of a
// matrix unit).
template <class C>
struct alignas(64) TileBuffer {
  C data[kMaxRows * kMaxVectors * Vec<C>::size];
};

DLK_ISA_END
