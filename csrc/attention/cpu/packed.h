// Packed operands of products of bf16 by a unit T (simd/bf16_dots.h, simd/amx_tiles.h). Both operands are copies,
// padded with zeros to whole tiles or vectors: the rows of the left one are [row][depth], the columns of the right one
// [pair of the depth][column]. Scores are stored [key][lane] as everywhere, so in products that give scores the rows
// are keys and the columns are lanes.
//
// A range of keys that does not fill its tiles is multiplied with zeros as the weights of the tiles' other keys. But 0
// times NaN or infinity is NaN, so if operands are not finite callers use unpacked products for such a range.
#pragma once

#include "attention/cpu/philox.h"

DLK_ISA_BEGIN

DLK_INLINE int64_t rounded_up(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }
// How many values a row of n values has in memory.
template <class T>
DLK_INLINE int64_t values_rounded(int64_t n) {
  return rounded_up(n, T::kWidth);
}
// How many of them take part in products.
template <class T>
DLK_INLINE int64_t depth_rounded(int64_t n) {
  return rounded_up(n, T::kDepth);
}
// n rounded up to whole vectors, as for the rows of a transposed operand.
template <class T>
DLK_INLINE int64_t size_rounded(int64_t n) {
  return rounded_up(n, T::kSize);
}

DLK_INLINE int at_most(int64_t n, int64_t most) { return static_cast<int>(std::clamp<int64_t>(n, 0, most)); }

// Packs rows of a tensor as rows of the left operand: [rows, whole tiles][ld].
template <class T>
DLK_NOINLINE void pack_rows(const bf16* from, int64_t stride, int64_t rows, int64_t width, bf16* to, int64_t ld) {
  for (int64_t r = 0; r < rounded_up(rows, T::kRows); ++r, from += stride, to += ld)
    for (int64_t x = 0; x < ld; x += T::kWidth)
      T::store(T::pairs(from + x, r < rows ? at_most(width - x, T::kWidth) : 0), to + x);
}

// Packs the transpose of a tensor's rows as rows of the left operand: [width, whole tiles][ld].
template <class T, class C>
DLK_NOINLINE void pack_transposed(const bf16* from, int64_t stride, int64_t rows, int64_t width, bf16* to, int64_t ld) {
  const auto count = [&](int64_t r, int64_t x) { return r < rows ? at_most(width - x, T::kSize) : 0; };
  for (int64_t r = 0; r < rows; r += T::kWidth)
    for (int64_t x = 0; x < width; x += T::kSize) {
      Vec<C> block[T::kSize];
      for (int p = 0; p < T::kSize; ++p) {
        const int64_t even = r + 2 * p, odd = even + 1;
        block[p] = T::pairs(from + even * stride + x, count(even, x), from + odd * stride + x, count(odd, x));
      }
      transpose(block);
      for (int c = 0; c < T::kSize; ++c) T::store(block[c], to + (x + c) * ld + r);
    }
}

// Packs the rows of a panel as columns of the right operand: [pair of the width, whole tiles][lanes of the panel].
template <class T, class C>
DLK_NOINLINE void pack_lanes(const Lanes<C>& lanes, const LanePanel& panel, const HeadTensor<const void*>& t,
                             int64_t width, C* to) {
  const int64_t ld = int64_t{panel.vectors} * T::kSize;
  for (int64_t l = 0; l < ld; l += T::kSize) {
    const bf16* row[T::kSize];
    for (int r = 0; r < T::kSize; ++r)
      row[r] = static_cast<const bf16*>(lanes.row_of(t, DType::bf16, panel.lane + std::min(l + r, panel.rows - 1)));
    for (int64_t x = 0; x < width; x += T::kWidth) {
      Vec<C> block[T::kSize];
      for (int r = 0; r < T::kSize; ++r) block[r] = T::pairs(row[r] + x, at_most(width - x, T::kWidth));
      transpose(block);
      for (int p = 0; p < T::kSize; ++p) block[p].store(to + (x / 2 + p) * ld + l);
    }
  }
}

// Packs the rows of a block as the right operand, with the lanes as its depth: [pair of lanes, whole tiles][ld].
template <class T, class C>
DLK_NOINLINE void pack_row_pairs(const Lanes<C>& lanes, const HeadTensor<const void*>& t, int64_t width, C* to,
                                 int64_t ld) {
  for (int64_t l = 0; l < depth_rounded<T>(lanes.rows); l += 2, to += ld) {
    const bf16* row[2];
    for (int half = 0; half < 2; ++half)
      row[half] = static_cast<const bf16*>(lanes.row_of(t, DType::bf16, std::min(l + half, lanes.rows - 1)));
    for (int64_t x = 0; x < width; x += T::kSize) {
      const int n = at_most(width - x, T::kSize);
      T::pairs(row[0] + x, l < lanes.rows ? n : 0, row[1] + x, l + 1 < lanes.rows ? n : 0).store(to + x);
    }
  }
}

// Keys [first, first + keys) of a block, and the whole tiles that hold them.
struct KeyRange {
  int64_t first, keys;
  int64_t end() const { return first + keys; }
  int64_t begin_of(int64_t grain) const { return first / grain * grain; }
  int64_t count_of(int64_t grain) const { return (end() + grain - 1) / grain * grain - begin_of(grain); }
  bool has(int64_t j) const { return j >= first && j < end(); }
  // Whether the range fills all of its tiles; the last tile may also end where the block ends.
  bool fills(int64_t grain, int64_t block) const {
    return first % grain == 0 && (end() % grain == 0 || end() == block);
  }
};

// Packs weights [key of the block][ld] as columns, rounded to bf16: from the range's first tile on, `width` lanes.
template <class T, class C>
DLK_NOINLINE void pack_weights(const C* weights, int64_t ld, int64_t width, const KeyRange& range, C* to) {
  const int64_t begin = range.begin_of(T::kDepth);
  const auto load = [&](int64_t j, int64_t l) __attribute__((always_inline)) {
    return range.has(j) ? Vec<C>::load(weights + j * ld + l) : Vec<C>::zero();
  };
  for (int64_t j = begin; j < begin + range.count_of(T::kDepth); j += 2, to += width)
    for (int64_t l = 0; l < width; l += T::kSize) T::pairs(load(j, l), load(j + 1, l)).store(to + l);
}

// Packs weights as rows of `lanes` lanes: [key][values of a row].
template <class T, class C>
DLK_NOINLINE void pack_weight_rows(const C* weights, int64_t ld, int64_t lanes, const KeyRange& range, bf16* to) {
  const int64_t begin = range.begin_of(T::kRows), width = values_rounded<T>(lanes);
  for (int64_t j = begin; j < begin + range.count_of(T::kRows); ++j, to += width)
    for (int64_t l = 0; l < width; l += T::kSize)
      T::round(range.has(j) ? Vec<C>::load(weights + j * ld + l, at_most(lanes - l, T::kSize)) : Vec<C>::zero(),
               to + l);
}

// A worker's packed operands in the forward: a block of rows and a block of keys.
template <class C, class T>
class PackedForward {
 public:
  void carve(Scratch& scratch, const AttentionShape& s, int64_t lanes, int64_t keys) {
    D_ = s.D, Dv_ = s.Dv, keys_ = keys;
    q_ = scratch.take<C>(lanes * values_rounded<T>(D_) / 2);
    k_ = scratch.take<bf16>(keys * values_rounded<T>(D_));
    v_ = scratch.take<bf16>(keys * size_rounded<T>(Dv_));
    weights_ = scratch.take<C>(keys / 2 * Lanes<C>::kWidth);
  }
  void set_rows(const Lanes<C>& lanes, const LanePanel& panel, const HeadTensor<const void*>& q) {
    pack_lanes<T>(lanes, panel, q, D_, rows_of(panel));
  }
  void set_keys(const void* k, int64_t stride, int64_t keys) {
    pack_rows<T>(static_cast<const bf16*>(k), stride, keys, D_, k_, values_rounded<T>(D_));
  }
  void set_values(const void* v, int64_t stride, int64_t keys) {
    pack_transposed<T, C>(static_cast<const bf16*>(v), stride, keys, Dv_, v_, keys_);
  }

  // Computes scores [key of the block][lanes of the panel] of the range, which is extended to whole tiles.
  void score(const LanePanel& panel, const KeyRange& range, C* scores) const {
    const int64_t ldk = values_rounded<T>(D_), ld = int64_t{panel.vectors} * T::kSize, begin = range.begin_of(T::kRows);
    T::multiply(range.count_of(T::kRows), ld, depth_rounded<T>(D_), k_ + begin * ldk, ldk, rows_of(panel), ld,
                scores + begin * ld, ld, false);
  }
  // out [Dv][lanes of the panel] += values, weighted by `weights`.
  void add_values(const LanePanel& panel, const KeyRange& range, const C* weights, C* out) const {
    const int64_t ld = int64_t{panel.vectors} * T::kSize;
    pack_weights<T>(weights, ld, ld, range, weights_);
    T::multiply(rounded_up(Dv_, T::kRows), ld, range.count_of(T::kDepth), v_ + range.begin_of(T::kDepth), keys_,
                weights_, ld, out, ld, true);
  }

 private:
  int64_t D_, Dv_, keys_;
  C *q_, *weights_;
  bf16 *k_, *v_;

  C* rows_of(const LanePanel& panel) const { return q_ + panel.lane * values_rounded<T>(D_) / 2; }
};

DLK_ISA_END
