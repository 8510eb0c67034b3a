// Computes pooled probabilities of attention: cell (r, c) is the mean over the queries of bin r of the
// sum over the keys of bin c. A task computes some bins of rows of one head.
#pragma once

#include "attention/cpu/state.h"

DLK_ISA_BEGIN

template <class C>
class AttentionMap {
 public:
  using V = Vec<C>;

  AttentionMap(const AttentionMapParams& params, const AttentionPlan& plan)
      : p_(params), in_(params.in), s_(params.in.shape), plan_(plan), scores_(params.in) {
    parts_ = std::max<int64_t>(1, std::min(p_.rows, (s_.M + plan.block_m - 1) / plan.block_m));
  }

  int64_t task_count() const { return s_.B * s_.H * parts_; }

  void carve(Scratch& scratch) {
    const int64_t lanes = Lanes<C>::lanes_for(plan_.block_m);
    for (int n = 0; n < plan_.threads; ++n) {
      Worker& w = workers_[n];
      w.lanes.carve(scratch, plan_.block_m);
      w.q = scratch.take<C>(kPacked ? 0 : lanes * s_.D);
      w.top = scratch.take<C>(lanes);
      w.weight = scratch.take<C>(lanes);
      w.scores = scratch.take<C>(plan_.block_n * Lanes<C>::kWidth);
      w.bias = scratch.take<C>(in_.mask.data ? (plan_.block_n + V::size) * Lanes<C>::kWidth : 0);
      w.k = scratch.take<C>(kPacked ? 0 : plan_.block_n * lanes_rounded<C>(s_.D));
      if constexpr (kPacked) w.packed.carve(scratch, s_, lanes, plan_.block_n);
    }
  }

  void run(int worker, int64_t index) {
    Worker& w = workers_[worker];
    const int64_t part = index % parts_, head = index / parts_ % s_.H, b = index / parts_ / s_.H;
    const int64_t first_bin = p_.rows * part / parts_, last_bin = p_.rows * (part + 1) / parts_;
    C* map = static_cast<C*>(p_.map) + (b * s_.H + head) * p_.rows * p_.cols;
    std::fill_n(map + first_bin * p_.cols, (last_bin - first_bin) * p_.cols, C(0));
    const int64_t end = bin_begin(last_bin, s_.M, p_.rows), kv_head = head / s_.group();
    for (int64_t i = bin_begin(first_bin, s_.M, p_.rows); i < end; i += plan_.block_m) {
      const int64_t rows = std::min(plan_.block_m, end - i);
      w.lanes.set(in_, b, kv_head, head % s_.group() * s_.M + i, rows);
      for (int64_t p = 0; p < w.lanes.panels; ++p) run_panel(w, w.lanes.panel[p], b, kv_head, map);
    }
    for (int64_t r = first_bin; r < last_bin; ++r) {
      const int64_t queries = bin_begin(r + 1, s_.M, p_.rows) - bin_begin(r, s_.M, p_.rows);
      for (int64_t c = 0; c < p_.cols && queries > 0; ++c) map[r * p_.cols + c] /= static_cast<C>(queries);
    }
  }

 private:
  static constexpr bool kPacked = Bf16Unit::kPresent;

  struct Worker {
    Lanes<C> lanes;
    C *q, *top, *weight, *scores, *bias, *k;
    PackedForward<C, Bf16Unit> packed;
  };

  const AttentionMapParams& p_;
  const AttentionInputs& in_;
  const AttentionShape& s_;
  const AttentionPlan& plan_;
  Scores<C> scores_;
  int64_t parts_;
  Worker workers_[kMaxMembers];

  // The first of n things whose bin, i * bins / n, is at least `bin`.
  static int64_t bin_begin(int64_t bin, int64_t n, int64_t bins) { return (bin * n + bins - 1) / bins; }

  void run_panel(Worker& w, const LanePanel& panel, int64_t b, int64_t kv_head, C* map) const {
    if constexpr (kPacked) {
      w.packed.set_rows(w.lanes, panel, in_.q);
    } else {
      rows_to_lanes(w.lanes, panel, in_.q, s_.dtype, s_.D, w.q);
    }
    for (int64_t l = 0; l < int64_t{panel.vectors} * V::size; ++l)
      w.lanes.read_statistics(p_.stats, panel.lane + l, w.top + l, w.weight + l);
    for (int64_t j = 0; j < s_.N; j += plan_.block_n) {
      ScoreTile<C> tile;
      tile.scores = w.scores, tile.bias = w.bias, tile.ld = int64_t{panel.vectors} * V::size;
      if (!scores_.clip(panel, j, std::min(plan_.block_n, s_.N - j), &tile) || !scores_.read_mask(w.lanes, &tile)) {
        continue;
      }
      const void* keys =
          advance(in_.k.data, s_.dtype, key_offset(in_, w.lanes.sequence, in_.k, b, kv_head, tile.first));
      if constexpr (kPacked) {
        w.packed.set_keys(keys, in_.k.row, tile.keys);
        w.packed.score(panel, KeyRange{0, tile.keys}, tile.scores);
      } else {
        const KeyRows<C> k =
            read_rows<C>(s_.dtype, keys, in_.k.row, tile.keys, s_.D, rows_in_place<C>(s_.dtype, in_.k.row, s_.D), w.k);
        multiply_rows(tile.keys, panel.vectors, k.data, k.ld, s_.D, w.q, tile.scores, tile.ld, false);
      }
      scores_.apply(w.lanes, tile, nullptr);
      for (int64_t v = 0; v < panel.vectors; ++v) pool(w, tile, v * V::size, map);
    }
  }

  // Adds one vector of lanes of a tile to the map, one column bin after the other.
  void pool(Worker& w, const ScoreTile<C>& tile, int64_t l, C* map) const {
    const auto probability = scores_.template probability<true>();
    const V top = V::load(w.top + l), weight = V::load(w.weight + l);
    const int64_t end = tile.first + tile.keys;
    for (int64_t j = tile.first; j < end;) {
      const int64_t column = j * p_.cols / s_.N, next = std::min(end, bin_begin(column + 1, s_.N, p_.cols));
      V sum = V::zero();
      for (; j < next; ++j) sum = sum + probability(V::load(tile.scores + (j - tile.first) * tile.ld + l), top, weight);
      alignas(64) C sums[V::size];
      sum.store(sums);
      for (int64_t r = 0; r < std::min<int64_t>(V::size, tile.panel->rows - l); ++r) {
        const int64_t bin = w.lanes.query[tile.panel->lane + l + r] * p_.rows / s_.M;
        map[bin * p_.cols + column] += sums[r];
      }
    }
  }
};

DLK_ISA_END
