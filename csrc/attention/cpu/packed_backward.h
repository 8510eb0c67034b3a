// A worker's packed operands in the backward on a bf16 unit: a chunk of keys and a block of rows. Tiles of weights, P
// and dS, are stored [key of the tile][lane of the block].
#pragma once

#include "attention/cpu/packed.h"

DLK_ISA_BEGIN

template <class C, class T>
class PackedBackward {
 public:
  void carve(Scratch& scratch, const AttentionShape& s, int64_t lanes, int64_t chunk, int64_t keys) {
    D_ = s.D, Dv_ = s.Dv, chunk_ = chunk;
    const int64_t depth = row(lanes);
    q_ = scratch.take<C>(lanes * row(D_) / 2);
    grad_ = scratch.take<C>(lanes * row(Dv_) / 2);
    q_pairs_ = scratch.take<C>(depth / 2 * wide(D_));
    grad_pairs_ = scratch.take<C>(depth / 2 * wide(Dv_));
    k_ = scratch.take<bf16>(chunk * row(D_));
    v_ = scratch.take<bf16>(chunk * row(Dv_));
    k_transposed_ = scratch.take<bf16>(chunk * wide(D_));
    columns_ = scratch.take<C>(keys / 2 * Lanes<C>::kWidth);
    rows_ = scratch.take<bf16>(keys * depth);
  }
  void set_keys(const void* k, int64_t k_stride, const void* v, int64_t v_stride, int64_t keys) {
    pack_rows<T>(static_cast<const bf16*>(k), k_stride, keys, D_, k_, row(D_));
    pack_rows<T>(static_cast<const bf16*>(v), v_stride, keys, Dv_, v_, row(Dv_));
    pack_transposed<T, C>(static_cast<const bf16*>(k), k_stride, keys, D_, k_transposed_, chunk_);
  }
  void set_rows(const Lanes<C>& lanes, const HeadTensor<const void*>& q, const HeadTensor<const void*>& grad) {
    for (int64_t p = 0; p < lanes.panels; ++p) {
      const LanePanel& panel = lanes.panel[p];
      pack_lanes<T>(lanes, panel, q, D_, q_ + panel.lane * row(D_) / 2);
      pack_lanes<T>(lanes, panel, grad, Dv_, grad_ + panel.lane * row(Dv_) / 2);
    }
    pack_row_pairs<T>(lanes, q, D_, q_pairs_, wide(D_));
    pack_row_pairs<T>(lanes, grad, Dv_, grad_pairs_, wide(Dv_));
  }

  // Computes the scores and dP of a panel and a range of the tile that begins at key `at` of the chunk. The range is
  // extended to whole tiles.
  void score(const LanePanel& panel, int64_t at, const KeyRange& range, C* scores, C* dp, int64_t ld) const {
    product(panel, at, range, k_, q_, D_, scores, ld);
    product(panel, at, range, v_, grad_, Dv_, dp, ld);
  }
  // dq [D][lanes of the panel] += k, weighted by ds.
  void add_dq(const LanePanel& panel, int64_t at, const KeyRange& range, const C* ds, int64_t ld, C* dq) const {
    const int64_t width = int64_t{panel.vectors} * T::kSize;
    pack_weights<T>(ds + panel.lane, ld, width, range, columns_);
    T::multiply(rounded_up(D_, T::kRows), width, range.count_of(T::kDepth),
                k_transposed_ + at + range.begin_of(T::kDepth), chunk_, columns_, width, dq, width, true);
  }
  // dk or dv [key of the chunk][width, whole vectors] += q or do, weighted by ds or p.
  void add_dk(int64_t at, const KeyRange& range, const C* ds, int64_t ld, int64_t lanes, C* dk) const {
    add_rows(at, range, ds, ld, lanes, q_pairs_, wide(D_), dk);
  }
  void add_dv(int64_t at, const KeyRange& range, const C* p, int64_t ld, int64_t lanes, C* dv) const {
    add_rows(at, range, p, ld, lanes, grad_pairs_, wide(Dv_), dv);
  }

 private:
  int64_t D_, Dv_, chunk_;
  C *q_, *grad_, *q_pairs_, *grad_pairs_, *columns_;
  bf16 *k_, *v_, *k_transposed_, *rows_;

  static int64_t row(int64_t width) { return values_rounded<T>(width); }
  static int64_t wide(int64_t width) { return size_rounded<T>(width); }

  static void product(const LanePanel& panel, int64_t at, const KeyRange& range, const bf16* keys, const C* rows,
                      int64_t D, C* out, int64_t ld) {
    const int64_t begin = range.begin_of(T::kRows), width = int64_t{panel.vectors} * T::kSize;
    T::multiply(range.count_of(T::kRows), width, depth_rounded<T>(D), keys + (at + begin) * row(D), row(D),
                rows + panel.lane * row(D) / 2, width, out + begin * ld + panel.lane, ld, false);
  }
  void add_rows(int64_t at, const KeyRange& range, const C* weights, int64_t ld, int64_t lanes, const C* pairs,
                int64_t width, C* out) const {
    pack_weight_rows<T>(weights, ld, lanes, range, rows_);
    T::multiply(range.count_of(T::kRows), width, depth_rounded<T>(lanes), rows_, row(lanes), pairs, width,
                out + (at + range.begin_of(T::kRows)) * width, width, true);
  }
};

DLK_ISA_END
