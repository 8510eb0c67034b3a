// Turns a tile's scores into the probabilities P that weight the values, and the gradients dP of these into the
// gradients dS of the scores, both in place.
#pragma once

#include "attention/cpu/scores.h"
#include "attention/cpu/philox.h"

DLK_ISA_BEGIN

template <class C>
class ScoreGradients {
 public:
  using V = Vec<C>;

  // What the lanes of a block need.
  struct Rows {
    C *top, *weight;  // as SoftmaxStatistics has them
    C* delta;         // minus the gradient of lse
    C* slope_sums;    // null = not wanted
    uint32_t* words;  // for dropout
  };

  ScoreGradients(const AttentionInputs& in, const Scores<C>& scores) : scores_(scores), dropout_(in) {}

  uint32_t* carve_words(Scratch& scratch) const {
    return scratch.take<uint32_t>(dropout_.active ? 4 * (Lanes<C>::kWidth + Words::size) : 0);
  }

  void make(const Lanes<C>& lanes, const ScoreTile<C>& tile, const Rows& rows, C* ds) const {
    if (dropout_.active) {
      drop(lanes, tile, rows, ds);
      return make_dropped(tile, rows, ds);
    }
    if (tile.masked()) return make<true>(tile, rows, ds);
    make<false>(tile, rows, ds);
  }

  void add_slopes(const Lanes<C>& lanes, const ScoreTile<C>& tile, const Rows& rows, const C* ds) const {
    for (int64_t l = 0; l < tile.width(); l += V::size) {
      const int64_t lane = tile.panel->lane + l;
      const V position = V::load(lanes.position + lane);
      V sum = V::zero();
      for (int64_t j = 0; j < tile.keys; ++j)
        sum = fma(V::load(ds + j * tile.ld + l), abs(position - V::set1(static_cast<C>(tile.first + j))), sum);
      (V::load(rows.slope_sums + lane) + sum).store(rows.slope_sums + lane);
    }
  }

  // Multiplies dS by the derivative of the softcap. Where dS is 0 the key may be hidden and the damping anything.
  void damp(const ScoreTile<C>& tile, const C* damping, C* ds) const {
    for (int64_t j = 0; j < tile.keys; ++j)
      for (int64_t at = j * tile.ld; at < j * tile.ld + tile.width(); at += V::size) {
        const V g = V::load(ds + at);
        select_gt(abs(g), V::zero(), g * V::load(damping + at), g).store(ds + at);
      }
  }

 private:
  const Scores<C>& scores_;
  Dropout dropout_;

  // Replaces the scores by P, with a negative sign where dropout drops it, and multiplies dP by the factors of dropout.
  void drop(const Lanes<C>& lanes, const ScoreTile<C>& tile, const Rows& rows, C* ds) const {
    const auto probability = scores_.template probability<true>();
    for (int64_t l = 0; l < tile.width(); l += V::size) {
      const V top = V::load(rows.top + tile.panel->lane + l), weight = V::load(rows.weight + tile.panel->lane + l);
      for (int64_t at = l; at < tile.keys * tile.ld; at += tile.ld)
        probability(V::load(tile.scores + at), top, weight).store(tile.scores + at);
    }
    drop_tile<C>(dropout_, lanes, tile, rows.words, [&](int64_t at, V kept) {
      (V::load(ds + at) * kept).store(ds + at);
      const V p = V::load(tile.scores + at);
      select_gt(kept, V::zero(), p, -p).store(tile.scores + at);
    });
  }

  void make_dropped(const ScoreTile<C>& tile, const Rows& rows, C* ds) const {
    const V kept = V::set1(static_cast<C>(dropout_.kept));
    for (int64_t l = 0; l < tile.width(); l += V::size) {
      const V delta = V::load(rows.delta + tile.panel->lane + l);
      for (int64_t at = l; at < tile.keys * tile.ld; at += tile.ld) {
        const V p = V::load(tile.scores + at);
        max(V::zero(), p * kept).store(tile.scores + at);  // with the operands in this order NaN stays NaN
        score_gradient<true>(abs(p), V::load(ds + at) - delta).store(ds + at);
      }
    }
  }

  template <bool kMasked>
  void make(const ScoreTile<C>& tile, const Rows& rows, C* ds) const {
    if (tile.panel->vectors == 3) return make<kMasked, 3>(tile, rows, ds);
    if (tile.panel->vectors == 2) return make<kMasked, 2>(tile, rows, ds);
    make<kMasked, 1>(tile, rows, ds);
  }

  // Goes through the keys in the order of the tile in memory.
  template <bool kMasked, int kVectors>
  DLK_NOINLINE void make(const ScoreTile<C>& tile, const Rows& rows, C* ds) const {
    const C *top = rows.top + tile.panel->lane, *weight = rows.weight + tile.panel->lane;
    const C* delta = rows.delta + tile.panel->lane;
    V row_delta[kVectors], row_top[kVectors], row_weight[kVectors];
    DLK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      row_top[v] = V::load(top + v * V::size);
      row_weight[v] = V::load(weight + v * V::size);
      row_delta[v] = V::load(delta + v * V::size);
    }
    const auto probability = scores_.template probability<kMasked>();
    C* scores = tile.scores;
    for (int64_t j = 0; j < tile.keys; ++j, scores += tile.ld, ds += tile.ld) {
      DLK_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V p = probability(V::load(scores + v * V::size), row_top[v], row_weight[v]);
        p.store(scores + v * V::size);
        score_gradient<kMasked>(p, V::load(ds + v * V::size) - row_delta[v]).store(ds + v * V::size);
      }
    }
  }

  // Where a key is hidden, P is 0 and dP may be anything.
  template <bool kMasked>
  static DLK_INLINE V score_gradient(V p, V g) {
    if constexpr (!kMasked) return p * g;
    return select_lt(p, V::set1(std::numeric_limits<C>::min()), V::zero(), p * g);
  }
};

DLK_ISA_END
