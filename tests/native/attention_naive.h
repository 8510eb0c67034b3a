// An oracle for attention, as slow and plain as possible: it computes one element after the other, every number is a
// double, and keys that the mask or a window hides are never read. It takes the same structs as the kernels and
// shares no code with them.
#pragma once

#include <cmath>
#include <vector>

#include "attention/params.h"
#include "naive_storage.h"

namespace dlk {
namespace naive {

struct Attention {
  const AttentionInputs& in;
  const AttentionShape& s;
  explicit Attention(const AttentionInputs& inputs) : in(inputs), s(inputs.shape) {}

  DType compute() const { return compute_dtype(s.dtype); }
  int64_t queries(int64_t b) const { return in.cu_q ? in.cu_q[b + 1] - in.cu_q[b] : s.M; }
  int64_t keys(int64_t b) const { return in.cu_k ? in.cu_k[b + 1] - in.cu_k[b] : s.N; }

  template <class Pointer>
  int64_t query_at(const HeadTensor<Pointer>& t, int64_t b, int64_t h, int64_t i) const {
    return h * t.h + (in.cu_q ? (in.cu_q[b] + i) * t.row : b * t.b + i * t.row);
  }
  template <class Pointer>
  int64_t key_at(const HeadTensor<Pointer>& t, int64_t b, int64_t h, int64_t j) const {
    return h * t.h + (in.cu_k ? (in.cu_k[b] + j) * t.row : b * t.b + j * t.row);
  }
  double q(int64_t b, int64_t h, int64_t i, int64_t d) const {
    return load(in.q.data, query_at(in.q, b, h, i) + d, s.dtype);
  }
  double k(int64_t b, int64_t h, int64_t j, int64_t d) const {
    return load(in.k.data, key_at(in.k, b, h / s.group(), j) + d, s.dtype);
  }
  double v(int64_t b, int64_t h, int64_t j, int64_t d) const {
    return load(in.v.data, key_at(in.v, b, h / s.group(), j) + d, s.dtype);
  }

  int64_t position(int64_t b, int64_t i) const {
    return i + (in.causal == Causal::bottom_right ? keys(b) - queries(b) : 0);
  }
  int64_t mask_at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * in.mask.b + h * in.mask.h + i * in.mask.i + j * in.mask.j;
  }
  bool visible(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t p = position(b, i);
    if (in.causal != Causal::none && j > p) return false;
    if (in.left >= 0 && j < p - in.left) return false;
    if (in.right >= 0 && j > p + in.right) return false;
    if (!in.mask.data) return true;
    const int64_t at = mask_at(b, h, i, j);
    if (in.mask.boolean) return static_cast<const uint8_t*>(in.mask.data)[at] != 0;
    return load(in.mask.data, at, in.mask.dtype) != -INFINITY;
  }

  // The score of a visible element. `slope` is set to the derivative of the softcap, 1 without one.
  double score(int64_t b, int64_t h, int64_t i, int64_t j, double* slope) const {
    double x = 0;
    for (int64_t d = 0; d < s.D; ++d) x += q(b, h, i, d) * k(b, h, j, d);
    x *= in.scale;
    *slope = 1;
    if (in.softcap != 0) {
      const double t = std::tanh(x / in.softcap);
      x = in.softcap * t;
      *slope = 1 - t * t;
    }
    if (in.slopes) x -= in.slopes[b * in.slopes_b + h] * distance(b, i, j);
    if (in.mask.data && !in.mask.boolean) x += load(in.mask.data, mask_at(b, h, i, j), in.mask.dtype);
    return x;
  }
  double distance(int64_t b, int64_t i, int64_t j) const { return std::fabs(static_cast<double>(position(b, i) - j)); }

  // The factor by which dropout multiplies an element: 0 or 1 / (1 - p). The generator is Philox4x32-10.
  double kept(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (in.dropout_p == 0) return 1;
    if (in.dropout_p == 1) return 0;
    uint32_t x[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(b * s.H + h),
                     in.offset};
    uint32_t key0 = static_cast<uint32_t>(in.seed), key1 = static_cast<uint32_t>(in.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = 0xd2511f53ull * x[0], c = 0xcd9e8d57ull * x[2];
      const uint32_t y[4] = {static_cast<uint32_t>(c >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(c),
                             static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
      std::memcpy(x, y, sizeof x);
      key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
    return x[j % 4] >= static_cast<uint32_t>(in.dropout_p * 4294967296.0) ? 1 / (1 - in.dropout_p) : 0;
  }

  // The factor by which the kernels' scores must be multiplied to become logits. Where a score is only scaled, the
  // kernels apply the scale inside the exponential and store unscaled scores; otherwise the factor is 1.
  double unit() const {
    bool scaled = in.softcap != 0 || in.slopes || (in.mask.data && !in.mask.boolean) || !(in.scale > 1e-20);
    const double most = s.dtype == DType::f64 ? 0x1p1023 : 0x1p127;
    for (int64_t h = 0; in.sinks && h < s.H; ++h)
      scaled = scaled || (std::isfinite(in.sinks[h]) && std::fabs(in.sinks[h]) > 0.999 * most * in.scale);
    return scaled ? 1 : s.dtype == DType::f64 ? in.scale : static_cast<double>(static_cast<float>(in.scale));
  }

  // The softmax statistics of a row.
  struct Row {
    double top, weight;
    Row(const Attention& a, const SoftmaxStatistics<const void*>& stats, int64_t b, int64_t h, int64_t i)
        : top(load(stats.top.data, a.query_at(stats.top, b, h, i), a.compute()) * a.unit()),
          weight(load(stats.weight.data, a.query_at(stats.weight, b, h, i), a.compute())) {}
    // `top` was rounded when it was stored, so a logit within that rounding error counts as equal to it.
    double probability(double logit) const {
      const double below = logit - top;
      return std::exp(std::fabs(top) > 1e8 && std::fabs(below) < 1e-6 * std::fabs(top) ? 0 : below) * weight;
    }
  };

  template <class F>
  void each_row(F f) const {
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t h = 0; h < s.H; ++h)
        for (int64_t i = 0; i < queries(b); ++i) f(b, h, i);
  }
};

inline void attention_forward(const AttentionForwardParams& p) {
  const Attention a(p.in);
  a.each_row([&](int64_t b, int64_t h, int64_t i) {
    double slope, largest = p.in.sinks ? p.in.sinks[h] : -INFINITY;
    Vector scores;
    std::vector<int64_t> seen;
    for (int64_t j = 0; j < a.keys(b); ++j) {
      if (!a.visible(b, h, i, j)) continue;
      seen.push_back(j);
      scores.push_back(a.score(b, h, i, j, &slope));
      largest = std::fmax(largest, scores.back());
    }
    double sum = p.in.sinks ? std::exp(p.in.sinks[h] - largest) : 0;
    for (double x : scores) sum += std::exp(x - largest);
    store(p.lse.data, a.query_at(p.lse, b, h, i), a.compute(), sum > 0 ? largest + std::log(sum) : -INFINITY);
    if (p.stats.top.data) {
      const auto put = [&](const HeadTensor<void*>& t, double value) {
        store(t.data, a.query_at(t, b, h, i), a.compute(), value);
      };
      put(p.stats.top, sum > 0 ? largest / a.unit() : INFINITY);
      put(p.stats.weight, sum > 0 ? 1 / sum : 0);
    }
    for (int64_t d = 0; p.o.data && d < a.s.Dv; ++d) {
      double o = 0;
      for (size_t n = 0; n < seen.size(); ++n)
        o += std::exp(scores[n] - largest) / sum * a.kept(b, h, i, seen[n]) * a.v(b, h, seen[n], d);
      store(p.o.data, a.query_at(p.o, b, h, i) + d, a.s.dtype, o);
    }
  });
}

// The backward starts from the o and the softmax statistics of the call, as they were rounded when they were stored.
inline void attention_backward(const AttentionBackwardParams& p) {
  const Attention a(p.in);
  const AttentionShape& s = a.s;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  const int64_t sequences = p.in.cu_q ? 1 : s.B;
  Vector dq(size(sequences * s.H * s.M * s.D)), dk(size(sequences * s.Hkv * s.N * s.D));
  Vector dv(size(sequences * s.Hkv * s.N * s.Dv)), dmask(size(p.dmask.elements));
  Vector dslopes(size(s.B * s.H)), dsinks(size(s.H));
  // Row indices into these vectors, [sequence, head, row].
  const auto row_q = [&](int64_t b, int64_t h, int64_t i) {
    return p.in.cu_q ? h * s.M + p.in.cu_q[b] + i : (b * s.H + h) * s.M + i;
  };
  const auto row_k = [&](int64_t b, int64_t h, int64_t j) {
    const int64_t kv = h / s.group();
    return p.in.cu_k ? kv * s.N + p.in.cu_k[b] + j : (b * s.Hkv + kv) * s.N + j;
  };
  a.each_row([&](int64_t b, int64_t h, int64_t i) {
    const Attention::Row row(a, p.stats, b, h, i);
    if (row.weight == 0) return;
    const auto grad = [&](int64_t d) { return load(p.grad_o.data, a.query_at(p.grad_o, b, h, i) + d, s.dtype); };
    double delta = 0;
    bool sees = false;
    for (int64_t j = 0; j < a.keys(b); ++j) sees = sees || a.visible(b, h, i, j);
    for (int64_t d = 0; sees && d < s.Dv; ++d) delta += grad(d) * load(p.o.data, a.query_at(p.o, b, h, i) + d, s.dtype);
    if (p.grad_lse.data) delta -= load(p.grad_lse.data, a.query_at(p.grad_lse, b, h, i), a.compute());
    if (p.in.sinks) dsinks[size(h)] -= row.probability(p.in.sinks[h]) * delta;
    for (int64_t j = 0; j < a.keys(b); ++j) {
      if (!a.visible(b, h, i, j)) continue;
      double slope, dp = 0;
      const double probability = row.probability(a.score(b, h, i, j, &slope)), kept = a.kept(b, h, i, j);
      for (int64_t d = 0; d < s.Dv; ++d) {
        dp += grad(d) * a.v(b, h, j, d) * kept;
        dv[size(row_k(b, h, j) * s.Dv + d)] += probability * kept * grad(d);
      }
      double ds = probability * (dp - delta);
      if (p.dmask.data) dmask[size(b * p.dmask.b + h * p.dmask.h + i * p.dmask.i + j * p.dmask.j)] += ds;
      dslopes[size(p.in.slopes_b * b + h)] -= ds * a.distance(b, i, j);
      ds *= slope * p.in.scale;
      for (int64_t d = 0; d < s.D; ++d) {
        dq[size(row_q(b, h, i) * s.D + d)] += ds * a.k(b, h, j, d);
        dk[size(row_k(b, h, j) * s.D + d)] += ds * a.q(b, h, i, d);
      }
    }
  });
  for (int64_t b = 0; b < s.B; ++b) {
    for (int64_t h = 0; p.dq.data && h < s.H; ++h)
      for (int64_t i = 0; i < a.queries(b); ++i)
        for (int64_t d = 0; d < s.D; ++d)
          store(p.dq.data, a.query_at(p.dq, b, h, i) + d, s.dtype, dq[size(row_q(b, h, i) * s.D + d)]);
    for (int64_t h = 0; p.dk.data && h < s.Hkv; ++h)
      for (int64_t j = 0; j < a.keys(b); ++j) {
        const int64_t row = row_k(b, h * s.group(), j);
        for (int64_t d = 0; d < s.D; ++d)
          store(p.dk.data, a.key_at(p.dk, b, h, j) + d, s.dtype, dk[size(row * s.D + d)]);
        for (int64_t d = 0; d < s.Dv; ++d)
          store(p.dv.data, a.key_at(p.dv, b, h, j) + d, s.dtype, dv[size(row * s.Dv + d)]);
      }
  }
  for (int64_t i = 0; i < p.dmask.elements; ++i) store(p.dmask.data, i, p.in.mask.dtype, dmask[size(i)]);
  for (int64_t i = 0; p.dslopes && i < (p.in.slopes_b ? s.B : 1) * s.H; ++i) p.dslopes[i] = dslopes[size(i)];
  for (int64_t h = 0; p.dsinks && h < s.H; ++h) p.dsinks[h] = dsinks[size(h)];
}

inline void attention_map(const AttentionMapParams& p) {
  const Attention a(p.in);
  const AttentionShape& s = a.s;
  Vector map(static_cast<size_t>(s.B * s.H * p.rows * p.cols));
  std::vector<int64_t> queries(static_cast<size_t>(p.rows));
  for (int64_t i = 0; i < s.M; ++i) ++queries[static_cast<size_t>(i * p.rows / s.M)];
  a.each_row([&](int64_t b, int64_t h, int64_t i) {
    const Attention::Row softmax(a, p.stats, b, h, i);
    const int64_t row = i * p.rows / s.M;
    for (int64_t j = 0; j < s.N; ++j) {
      double slope;
      if (a.visible(b, h, i, j))
        map[static_cast<size_t>(((b * s.H + h) * p.rows + row) * p.cols + j * p.cols / s.N)] +=
            softmax.probability(a.score(b, h, i, j, &slope)) / static_cast<double>(queries[static_cast<size_t>(row)]);
    }
  });
  for (size_t i = 0; i < map.size(); ++i) store(p.map, static_cast<int64_t>(i), a.compute(), map[i]);
}

}  // namespace naive
}  // namespace dlk
