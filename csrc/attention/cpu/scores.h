// Turns products q.k into scores: applies scale, softcap, ALiBi and mask, and sets hidden places to -inf.
// Tiles are stored [key][lane]. A call without softcap, ALiBi and additive mask keeps its raw products:
// the scale is then a factor inside the exponential.
#pragma once

#include "attention/cpu/lanes.h"

DLK_ISA_BEGIN

// A rectangle of scores: a panel by keys [first, first + keys).
template <class C>
struct ScoreTile {
  const LanePanel* panel;
  int64_t first, keys;
  C* scores;  // [keys][ld], the panel's lanes from column 0 on
  int64_t ld;
  C* bias;       // [keys][width()]: what the mask adds; or null
  bool partial;  // some lane may not see some key, by causal or window
  bool biased;   // bias is to be added
  bool holes;    // the mask hides something
  bool masked() const { return partial || holes; }
  int64_t width() const { return int64_t{panel->vectors} * Vec<C>::size; }
  void clear_spare_lanes() const {
    for (int64_t j = 0; j < keys; ++j) std::fill(scores + j * ld + panel->rows, scores + j * ld + width(), C(0));
  }
};

template <class C>
class Scores {
 public:
  explicit Scores(const AttentionInputs& in)
      : in_(in),
        transformed_(in.softcap != 0 || in.slopes || (in.mask.data && !in.mask.boolean) || !(in.scale > kLeastFactor) ||
                     exceeds(in)) {}

  // The factor from scores to logits.
  C to_natural() const { return static_cast<C>(transformed_ ? 1 : in_.scale); }
  // The factor from scores to exponents of 2.
  C to_base2() const { return static_cast<C>(1.4426950408889634 * static_cast<double>(to_natural())); }

  // Computes probabilities from scores and a row's statistics. The result is exactly 1 for a key that has all of the
  // row's probability. With kMasked it is 0 for hidden keys, whatever the statistics are.
  template <bool kMasked>
  struct Probability {
    using V = Vec<C>;
    Exp2Down<C> exp2;
    DLK_INLINE V operator()(V score, V top, V weight) const {
      const V p = exp2(score - top) * weight;
      if constexpr (!kMasked) return p;
      return select_lt(score, V::set1(std::numeric_limits<C>::lowest()), V::zero(), p);
    }
  };
  template <bool kMasked>
  DLK_INLINE Probability<kMasked> probability() const {
    return {Exp2Down<C>(to_base2())};
  }

  // The state with which a row begins. A sink is like a key that has a probability but no value. `top` is its score
  // rounded to C, and `weight` is e to the power of the rounding error of its logit; or 1 if that error exceeds 1,
  // because the logit is then so large that the sink has either all of the probability or none.
  struct Sink {
    C top, weight;
  };
  Sink sink(double logit) const {
    constexpr double kNone = -std::numeric_limits<double>::infinity();
    if (logit == kNone) return {static_cast<C>(kNone), C(0)};
    const double natural = static_cast<double>(to_natural());
    const C top = static_cast<C>(logit / natural);
    const double lost = logit - static_cast<double>(top) * natural;
    return {top, std::abs(lost) > 1 ? C(1) : static_cast<C>(std::exp(lost))};
  }

  // Limits the tile to those keys of [first, first + keys) that some lane of the panel sees; false if there are none.
  bool clip(const LanePanel& panel, int64_t first, int64_t keys, ScoreTile<C>* tile) const {
    const int64_t begin = std::max(first, panel.first_begin), end = std::min(first + keys, panel.last_end);
    tile->panel = &panel;
    tile->first = begin;
    tile->keys = end - begin;
    tile->partial = panel.last_begin > begin || panel.first_end < end;
    tile->biased = tile->holes = false;
    return begin < end;
  }

  // Reads the mask of a tile; false if it hides everything.
  bool read_mask(const Lanes<C>& lanes, ScoreTile<C>* tile) const {
    if (!in_.mask.data) return true;
    using V = Vec<C>;
    const int64_t ld = tile->width();
    V largest = V::set1(-std::numeric_limits<C>::infinity()), smallest = V::zero();
    const LanePanel& panel = *tile->panel;
    if (in_.mask.i == 0 && (in_.mask.h == 0 || lanes.head[panel.lane] == lanes.head[panel.lane + panel.rows - 1])) {
      const int64_t row = mask_row(lanes, panel.lane);
      for (int64_t j = 0; j < tile->keys; j += V::size) {
        const int n = static_cast<int>(tile->keys - j < V::size ? tile->keys - j : V::size);
        alignas(64) C values[V::size];
        read(row, tile->first + j, n).store(values);
        for (int c = 0; c < n; ++c) {
          const V value = V::set1(values[c]);
          largest = max(value, largest), smallest = min(value, smallest);
          for (int64_t l = 0; l < ld; l += V::size) value.store(tile->bias + (j + c) * ld + l);
        }
      }
    } else {
      const bool plain = reads_full();
      const int64_t item = in_.mask.boolean ? 1 : item_size(in_.mask.dtype);
      for (int64_t l = 0; l < ld; l += V::size) {
        int64_t row[V::size];
        int64_t next[V::size];  // prefetched, because the hardware's prefetchers do not follow rows that are far apart
        for (int r = 0; r < V::size; ++r) {
          row[r] = mask_row(lanes, panel.lane + std::min(l + r, panel.rows - 1));
          next[r] = mask_row(lanes, std::min(panel.lane + l + V::size + r, lanes.rows - 1)) + tile->first;
        }
        for (int64_t j = 0; j < tile->keys; j += V::size) {
          const int n = static_cast<int>(tile->keys - j < V::size ? tile->keys - j : V::size);
          V block[V::size];
          if (n == V::size && plain) {
            DLK_UNROLL
            for (int r = 0; r < V::size; ++r) {
              block[r] = read_full(row[r] + tile->first + j);
              __builtin_prefetch(static_cast<const char*>(in_.mask.data) + (next[r] + j) * item, 0, 2);
            }
          } else {
            for (int r = 0; r < V::size; ++r) block[r] = read(row[r], tile->first + j, n);
          }
          transpose(block);
          DLK_UNROLL
          for (int c = 0; c < V::size; ++c) {
            if (c == n) break;
            largest = max(block[c], largest), smallest = min(block[c], smallest);
            block[c].store(tile->bias + (j + c) * ld + l);
          }
        }
      }
    }
    tile->holes = any(smallest, [](C x) { return x == -std::numeric_limits<C>::infinity(); });
    tile->biased = !in_.mask.boolean || tile->holes;
    if (any(largest, [](C x) { return x > -std::numeric_limits<C>::infinity(); })) return true;
    return !in_.mask.boolean && has_nan(*tile, ld);  // largest and smallest do not show NaN
  }

  // Turns products into scores, in place. `damping`, if not null, receives the derivative of the
  // softcap, by which gradients of the scores are multiplied.
  void apply(const Lanes<C>& lanes, const ScoreTile<C>& tile, C* damping) const {
    if (transformed_) {
      if (tile.partial)
        return tile.biased ? apply<true, true, true>(lanes, tile, damping)
                           : apply<true, false, true>(lanes, tile, damping);
      return tile.biased ? apply<true, true, false>(lanes, tile, damping)
                         : apply<true, false, false>(lanes, tile, damping);
    }
    if (tile.partial)
      return tile.biased ? apply<false, true, true>(lanes, tile, damping)
                         : apply<false, false, true>(lanes, tile, damping);
    if (tile.biased) apply<false, true, false>(lanes, tile, damping);
  }

 private:
  const AttentionInputs& in_;
  bool transformed_;

  // With a smaller scale scores are transformed, because a sink's logit cannot be divided by it.
  static constexpr double kLeastFactor = 1e-20;

  // Whether some sink is too large to be divided by the scale.
  static bool exceeds(const AttentionInputs& in) {
    constexpr double kMost = static_cast<double>(std::numeric_limits<C>::max()) / 2;
    for (int64_t h = 0; in.sinks && h < in.shape.H; ++h)
      if (std::isfinite(in.sinks[h]) && std::abs(in.sinks[h]) > kMost * in.scale) return true;
    return false;
  }

  template <bool kTransformed, bool kBiased, bool kPartial>
  DLK_NOINLINE void apply(const Lanes<C>& lanes, const ScoreTile<C>& tile, C* damping) const {
    using V = Vec<C>;
    const int64_t ld = tile.ld, width = tile.width();
    const V none = V::set1(-std::numeric_limits<C>::infinity()), scale = V::set1(static_cast<C>(in_.scale));
    const bool capped = in_.softcap != 0, sloped = in_.slopes != nullptr, boolean = in_.mask.boolean;
    for (int64_t l = 0; l < width; l += V::size) {
      const int64_t lane = tile.panel->lane + l;
      const V position = V::load(lanes.position + lane), slope = V::load(lanes.slope + lane);
      V begin = V::zero(), end = V::zero();
      if constexpr (kPartial) {
        alignas(64) C bounds[2][V::size];
        for (int i = 0; i < V::size; ++i) {  // counted from the tile's first key, so that floats are exact
          bounds[0][i] = static_cast<C>(std::max<int64_t>(0, lanes.begin[lane + i] - tile.first));
          bounds[1][i] = static_cast<C>(std::min(tile.keys, lanes.end[lane + i] - tile.first));
        }
        begin = V::load(bounds[0]), end = V::load(bounds[1]);
      }
      for (int64_t j = 0; j < tile.keys; ++j) {
        const int64_t at = j * ld + l;
        V s = V::load(tile.scores + at);
        if constexpr (kTransformed) {
          s = s * scale;
          if (capped) s = cap(s, damping ? damping + at : nullptr);
          if (sloped) s = fnma(slope, abs(position - V::set1(static_cast<C>(tile.first + j))), s);
        }
        if constexpr (kBiased) {
          const V bias = V::load(tile.bias + j * width + l);
          s = select_gt(bias, none, boolean ? s : s + bias, bias + none);
        }
        if constexpr (kPartial) {
          const V key = V::set1(static_cast<C>(j));
          s = select_gt(begin, key, none, select_gt(end, key, s, none));
        }
        s.store(tile.scores + at);
      }
    }
  }

  DLK_INLINE Vec<C> cap(Vec<C> s, C* damping) const {
    using V = Vec<C>;
    const V t = tanh(s * V::set1(static_cast<C>(1 / in_.softcap)));
    if (damping) fnma(t, t, V::set1(C(1))).store(damping);
    return V::set1(static_cast<C>(in_.softcap)) * t;
  }

  template <class Test>
  static bool any(Vec<C> a, Test test) {
    alignas(64) C lanes[Vec<C>::size];
    a.store(lanes);
    for (C x : lanes)
      if (test(x)) return true;
    return false;
  }
  static bool has_nan(const ScoreTile<C>& tile, int64_t ld) {
    for (int64_t i = 0; i < tile.keys * ld; ++i)
      if (tile.bias[i] != tile.bias[i]) return true;
    return false;
  }

  int64_t mask_row(const Lanes<C>& lanes, int64_t lane) const {
    return lanes.b * in_.mask.b + lanes.head[lane] * in_.mask.h + lanes.query[lane] * in_.mask.i;
  }

  // Returns n mask values of a row from key j on; the other lanes may be anything.
  DLK_INLINE Vec<C> read(int64_t row, int64_t j, int n) const {
    constexpr int kSize = Vec<C>::size;
    const MaskTensor& m = in_.mask;
    if (n == kSize && reads_full()) return read_full(row + j);
    if (m.boolean) {
      const uint8_t* bytes = static_cast<const uint8_t*>(m.data) + row + j * m.j;
      alignas(64) uint8_t copy[kSize] = {};
      for (int i = 0; i < n; ++i) copy[i] = bytes[i * m.j];
      return bias_of_bools<C>(copy);
    }
    if (reads_full()) return load_any<C>(m.dtype, m.data, row + j, n);
    alignas(64) C copy[kSize] = {};
    for (int i = 0; i < n; ++i) copy[i] = read_one(row + (j + i) * m.j);
    return Vec<C>::load(copy);
  }

  // Whether the mask's values are contiguous along the keys and of a type that is loaded as vectors.
  bool reads_full() const {
    return in_.mask.j == 1 && (in_.mask.boolean || !std::is_same_v<C, double> || in_.mask.dtype == DType::f64);
  }
  DLK_INLINE Vec<C> read_full(int64_t at) const {
    const MaskTensor& m = in_.mask;
    if (m.boolean) return bias_of_bools<C>(static_cast<const uint8_t*>(m.data) + at);
    return load_any<C>(m.dtype, m.data, at, Vec<C>::size);
  }

  C read_one(int64_t at) const {
    switch (in_.mask.dtype) {
      case DType::f64:
        return static_cast<C>(static_cast<const double*>(in_.mask.data)[at]);
      case DType::f32:
        return static_cast<C>(static_cast<const float*>(in_.mask.data)[at]);
      case DType::bf16:
        return static_cast<C>(to_float(static_cast<const bf16*>(in_.mask.data)[at]));
      default:
        return static_cast<C>(to_float(static_cast<const f16*>(in_.mask.data)[at]));
    }
  }
};

DLK_ISA_END
