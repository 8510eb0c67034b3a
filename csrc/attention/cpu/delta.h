// Computes delta = sum(do o) of every row, which the backward needs first. It is summed in the order of dP, so that
// a row that sees one key gets a gradient of exactly 0. Also computes the gradients of the sinks: a sink has
// a probability like a key, but no value.
#pragma once

#include "attention/cpu/scores.h"

DLK_ISA_BEGIN

template <class C>
class RowDeltas {
 public:
  using V = Vec<C>;

  RowDeltas(const AttentionBackwardParams& params, const Scores<C>& scores)
      : p_(params), s_(params.in.shape), scores_(scores) {}

  void carve(Scratch& scratch) {
    delta_ = scratch.take<C>(p_.in.cu_q ? s_.H * s_.M : s_.B * s_.H * s_.M);
    sinks_ = scratch.take<double>(p_.dsinks ? s_.B * s_.H : 0);
  }
  void begin() {
    if (sinks_) std::fill_n(sinks_, s_.B * s_.H, 0.0);
  }

  C at(const Lanes<C>& lanes, int64_t lane) const { return delta_[lanes.offset(like_lse(), lane)]; }

  // Computes delta of the rows of `lanes`. grad holds do as panels, o has room for a panel.
  void make(const Lanes<C>& lanes, const C* grad, C* o) {
    for (int64_t p = 0; p < lanes.panels; ++p) {
      const LanePanel& panel = lanes.panel[p];
      rows_to_lanes(lanes, panel, p_.o, s_.dtype, s_.Dv, o);
      const int64_t ld = int64_t{panel.vectors} * V::size;
      for (int64_t l = 0; l < panel.rows; l += V::size) {
        alignas(64) C sums[V::size];
        sum_products(grad + panel.lane * s_.Dv + l, o + l, ld).store(sums);
        for (int64_t r = 0; r < std::min<int64_t>(V::size, panel.rows - l); ++r) {
          delta_[lanes.offset(like_lse(), panel.lane + l + r)] = sums[r];
          if (sinks_) add_sink(lanes, panel.lane + l + r, static_cast<double>(sums[r]));
        }
      }
    }
  }

  void finish() const {
    if (!sinks_) return;
    std::fill_n(p_.dsinks, s_.H, 0.0);
    for (int64_t b = 0; b < s_.B; ++b)
      for (int64_t h = 0; h < s_.H; ++h) p_.dsinks[h] += sinks_[b * s_.H + h];
  }

 private:
  const AttentionBackwardParams& p_;
  const AttentionShape& s_;
  const Scores<C>& scores_;
  C* delta_ = nullptr;
  double* sinks_ = nullptr;  // [B * H]

  HeadTensor<C*> like_lse() const { return {delta_, s_.H * s_.M, s_.M, 1}; }

  V sum_products(const C* grad, const C* o, int64_t ld) const {
    const V least = V::set1(std::numeric_limits<C>::min());
    // Where o is 0 the gradient does not matter, and for a row that sees nothing the gradient may be anything.
    const auto wanted = [&](int64_t x) __attribute__((always_inline)) {
      return select_lt(abs(V::load(o + x * ld)), least, V::zero(), V::load(grad + x * ld));
    };
    if constexpr (Bf16Unit::kPresent) {
      return Unit<C>::diagonal(s_.Dv, [&](int64_t x) { return V::load(o + x * ld); }, wanted);
    }
    const int64_t slice = slice_of(s_.Dv);
    V total = V::zero();
    for (int64_t x = 0; x < s_.Dv;) {
      const int64_t left = s_.Dv - x, end = x + (left < slice + slice / 2 ? left : slice);
      V sum = V::zero();
      for (; x < end; ++x) sum = fma(V::load(o + x * ld), wanted(x), sum);
      total = total + sum;
    }
    return total;
  }

  void add_sink(const Lanes<C>& lanes, int64_t lane, double delta) const {
    const auto sink = scores_.sink(p_.in.sinks[lanes.head[lane]]);
    if (sink.weight == 0) return;
    C top, weight;
    lanes.read_statistics(p_.stats, lane, &top, &weight);
    if (p_.grad_lse.data)
      delta -= static_cast<double>(static_cast<const C*>(p_.grad_lse.data)[lanes.offset(p_.grad_lse, lane)]);
    const double below =
        (static_cast<double>(sink.top) - static_cast<double>(top)) * static_cast<double>(scores_.to_natural());
    const double probability = std::exp(below) * static_cast<double>(sink.weight) * static_cast<double>(weight);
    sinks_[lanes.b * s_.H + lanes.head[lane]] -= probability * delta;
  }
};

DLK_ISA_END
