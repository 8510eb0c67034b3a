// The state of a task's rows after the keys so far (online softmax): m, about the maximum of each row's scores, the sum
// l of the exponentials of score - m, and the sum o of the values with these exponentials as weights. The exponential
// of 0 is exactly 1.
#pragma once

#include "attention/cpu/packed_backward.h"

DLK_ISA_BEGIN

template <class C>
struct RowState {
  using V = Vec<C>;
  C* o;                 // panels [ld][lanes]; or [lane][ld] if few rows are multiplied by dot products
  C *m, *l;             // [lanes]
  C to_natural;         // a score times this is a logit,
  C to_base2;           // and times this an exponent of 2
  int64_t width;        // Dv
  bool by_rows, rough;  // rough: o is rounded to 16 bits, and lse need not be better than 3e-6

  // m is set to the maximum only when that exceeds m by so many powers of 2: scaling o to another m
  // takes time, and exponentials somewhat above 1 are as exact.
  static constexpr C kHeadroom = 8;

  static int64_t elements(int64_t lanes, int64_t width) { return lanes * (lanes_rounded<C>(width) + 2); }

  RowState() = default;
  RowState(C* memory, int64_t lanes, const AttentionShape& shape, bool rows, const Scores<C>& scores)
      : o(memory + 2 * lanes),
        m(memory),
        l(memory + lanes),
        to_natural(scores.to_natural()),
        to_base2(scores.to_base2()),
        width(shape.Dv),
        by_rows(rows),
        rough(shape.dtype == DType::bf16 || shape.dtype == DType::f16) {}

  int64_t ld() const { return lanes_rounded<C>(width); }
  C* of(const LanePanel& panel) const { return o + panel.lane * ld(); }

  // Replaces the m = -inf of rows that have seen nothing by 0, because -inf minus itself is NaN.
  static V finite(V m) { return select_gt(m, V::set1(-std::numeric_limits<C>::infinity()), m, V::zero()); }
  // The factor that scales sums of exponentials of score - from to those of score - to.
  V decay(V from, V to) const { return Exp2Down<C>(to_base2)(from - finite(to)); }

  void begin(const Lanes<C>& lanes, const double* sinks, const Scores<C>& scores) const {
    for (int64_t i = 0; i < lanes.count; ++i) {
      const auto sink = scores.sink(sinks ? sinks[lanes.head[i]] : -std::numeric_limits<double>::infinity());
      m[i] = sink.top, l[i] = sink.weight;
    }
    std::fill_n(o, lanes.count * ld(), C(0));
  }

  double lse(int64_t lane) const {
    return l[lane] == 0 ? -std::numeric_limits<double>::infinity()
                        : logit(lane) + std::log(static_cast<double>(l[lane]));
  }

  // Turns scores into exponentials, adds them to l, and scales l and o to the new m.
  void softmax(const ScoreTile<C>& tile) const {
    if constexpr (std::is_same_v<C, float>) {
      if (rough) return softmax<true>(tile);
    }
    if constexpr (!Bf16Unit::kPresent) softmax<false>(tile);
  }

  // Adds the state of the same rows after other keys.
  void add(const Lanes<C>& lanes, const RowState& other) const {
    for (int64_t p = 0; p < lanes.panels; ++p) {
      const LanePanel& panel = lanes.panel[p];
      for (int64_t lane = 0; lane < int64_t{panel.vectors} * V::size; lane += V::size) {
        const int64_t at = panel.lane + lane;
        const V ours = V::load(m + at), theirs = V::load(other.m + at), largest = max(ours, theirs);
        const V a = decay(ours, largest), b = decay(theirs, largest);
        largest.store(m + at);
        fma(V::load(l + at), a, V::load(other.l + at) * b).store(l + at);
        add_values(panel, lane, a, other.of(panel), b);
      }
    }
  }

 private:
  template <bool kRough>
  DLK_INLINE void softmax(const ScoreTile<C>& tile) const {
    if (tile.panel->vectors == 3) return softmax<kRough, 3>(tile);
    if (tile.panel->vectors == 2) return softmax<kRough, 2>(tile);
    softmax<kRough, 1>(tile);
  }

  double logit(int64_t lane) const { return static_cast<double>(m[lane]) * static_cast<double>(to_natural); }

  // Goes through the keys in the order of the tile in memory, because the tile and the operands of its products may not
  // fit into L1 together.
  template <bool kRough, int kVectors>
  DLK_NOINLINE void softmax(const ScoreTile<C>& tile) const {
    constexpr int kKeys = kVectors == 1 ? 4 : 2;  // at once
    const Exp2Down<C, kRough> exp2(to_base2);
    const int64_t ld = tile.ld, whole = tile.keys / kKeys * kKeys;
    V parts[kKeys][kVectors], subtracted[kVectors], rescale[kVectors];
    fill(parts, -std::numeric_limits<C>::infinity());
    C* scores = tile.scores;
    int64_t j = 0;
    for (; j < whole; j += kKeys, scores += kKeys * ld) {
      DLK_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        DLK_UNROLL
        for (int v = 0; v < kVectors; ++v) parts[i][v] = max(V::load(scores + i * ld + v * V::size), parts[i][v]);
      }
    }
    for (; j < tile.keys; ++j, scores += ld) {
      DLK_UNROLL
      for (int v = 0; v < kVectors; ++v) parts[0][v] = max(V::load(scores + v * V::size), parts[0][v]);
    }
    DLK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      C* const at = m + tile.panel->lane + v * V::size;
      const V before = V::load(at);
      V highest = parts[0][v];
      DLK_UNROLL
      for (int i = 1; i < kKeys; ++i) highest = max(parts[i][v], highest);
      const V now = select_gt((highest - before) * exp2.factor, V::set1(kHeadroom), highest, before);
      now.store(at);
      subtracted[v] = finite(now);
      rescale[v] = exp2(before - subtracted[v]);
    }
    fill(parts, C(0));
    const auto exponential = [&](C* score, int v) __attribute__((always_inline)) {
      const V e = exp2(V::load(score + v * V::size) - subtracted[v]);
      e.store(score + v * V::size);
      return e;
    };
    for (j = 0, scores = tile.scores; j < whole; j += kKeys, scores += kKeys * ld) {
      DLK_UNROLL
      for (int i = 0; i < kKeys; i += 2) {
        DLK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          C *const a = scores + i * ld + v * V::size, *const b = a + ld;
          const Pair<V> e = exp2(Pair<V>{V::load(a), V::load(b)} - spread<Pair<V>>(subtracted[v]));
          e.a.store(a), e.b.store(b);
          parts[i][v] = parts[i][v] + e.a;
          parts[i + 1][v] = parts[i + 1][v] + e.b;
        }
      }
    }
    for (; j < tile.keys; ++j, scores += ld) {
      DLK_UNROLL
      for (int v = 0; v < kVectors; ++v) parts[0][v] = parts[0][v] + exponential(scores, v);
    }
    DLK_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      C* const at = l + tile.panel->lane + v * V::size;
      V sum = parts[0][v];
      DLK_UNROLL
      for (int i = 1; i < kKeys; ++i) sum = sum + parts[i][v];
      fma(V::load(at), rescale[v], sum).store(at);
      if (hsum(abs(rescale[v] - V::set1(C(1)))) != 0)
        add_values(*tile.panel, v * V::size, rescale[v], nullptr, V::zero());
    }
  }

  template <int kKeys, int kVectors>
  static DLK_INLINE void fill(V (&parts)[kKeys][kVectors], C value) {
    DLK_UNROLL
    for (int i = 0; i < kKeys; ++i) {
      DLK_UNROLL
      for (int v = 0; v < kVectors; ++v) parts[i][v] = V::set1(value);
    }
  }

  // o = o a + other b for a vector of lanes; other may be null.
  void add_values(const LanePanel& panel, int64_t lane, V a, const C* other, V b) const {
    C* ours = of(panel);
    if (!by_rows) {
      const int64_t lanes = int64_t{panel.vectors} * V::size;
      for (int64_t at = lane; at < width * lanes + lane; at += lanes) {
        const V value = other ? V::load(other + at) * b : V::zero();
        fma(V::load(ours + at), a, value).store(ours + at);
      }
      return;
    }
    alignas(64) C times[2][V::size];
    a.store(times[0]), b.store(times[1]);
    for (int64_t r = 0; r < std::min<int64_t>(V::size, panel.rows - lane); ++r)
      for (int64_t at = (lane + r) * ld(); at < (lane + r + 1) * ld(); at += V::size) {
        const V value = other ? V::load(other + at) * V::set1(times[1][r]) : V::zero();
        fma(V::load(ours + at), V::set1(times[0][r]), value).store(ours + at);
      }
  }
};

DLK_ISA_END
