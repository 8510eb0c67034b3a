// Random layer calls for the kernel tests: shapes, layouts, and buffers of exactly the size that rnn/params.h asks for,
// so that the address sanitizer reports any access beyond them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/isa.h"
#include "rnn/params.h"
#include "naive.h"

namespace dlk {

using Random = std::mt19937_64;

inline int64_t item_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline bool chance(Random& random, double p) { return std::uniform_real_distribution<double>()(random) < p; }

template <class T, size_t n>
T pick(Random& random, const T (&from)[n]) {
  return from[std::uniform_int_distribution<size_t>(0, n - 1)(random)];
}

class Buffer {
 public:
  Buffer() = default;                 // an absent tensor, whose pointer is null
  Buffer(int64_t count, DType dtype)  // every element is NaN until it is written
      : count_(count), dtype_(dtype), bytes_(new char[static_cast<size_t>(count * item_bytes(dtype))]) {
    if (count) std::memset(bytes_.get(), 0xff, static_cast<size_t>(count * item_bytes(dtype)));
  }
  static Buffer random(int64_t count, DType dtype, Random& random, double scale) {
    Buffer buffer(count, dtype);
    std::uniform_real_distribution<double> uniform(-scale, scale);
    for (int64_t i = 0; i < count; ++i) naive::store(buffer.get(), i, dtype, uniform(random));
    return buffer;
  }

  void* get() const { return bytes_.get(); }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }
  double at(int64_t i) const { return naive::load(get(), i, dtype_); }
  bool same_bits(int64_t i, const Buffer& other, int64_t j) const {
    const size_t n = static_cast<size_t>(item_bytes(dtype_));
    return std::memcmp(bytes_.get() + static_cast<size_t>(i) * n, other.bytes_.get() + static_cast<size_t>(j) * n, n) ==
           0;
  }
  void copy(int64_t to, const Buffer& from, int64_t at, int64_t n) {
    const int64_t size = item_bytes(dtype_);
    if (n) std::memcpy(bytes_.get() + to * size, from.bytes_.get() + at * size, static_cast<size_t>(n * size));
  }

 private:
  int64_t count_ = 0;
  DType dtype_ = DType::f32;
  std::unique_ptr<char[]> bytes_;
};

// The dtypes of a call's tensors. shape.dtype is the dtype to which the operands of products may be rounded.
struct Types {
  DType x, weights, h0, c0, h, c;
  bool of_one(DType dtype) const {
    for (DType of : {x, weights, h0, c0, h, c})
      if (of != dtype) return false;
    return true;
  }
};

struct Case {
  LayerShape shape{};
  Types types{};
  Isa isa = Isa::scalar;
  int threads = 1;
  bool bias = true, h0 = true, c0 = true, save = true, prepacked = false, deterministic = false;
  bool dy = true, dh_n = true, dc_n = true, need_x = true, need_state = true, need_weights = true, gate_grads = false;
  bool batch_first = false;
  int64_t gap = 0;  // unused elements between rows
  int64_t bptt_steps = 0;
  std::vector<int64_t> batch_sizes, lengths;  // at most one of them
  std::vector<uint8_t> resets;                // [rows], or empty
  bool cells = false, dcells = false;

  bool packed() const { return !batch_sizes.empty(); }
  int64_t length(int64_t b) const {
    return naive::Walk{shape, packed() ? batch_sizes.data() : nullptr, lengths.empty() ? nullptr : lengths.data()}
        .length(b);
  }
  int64_t row(int64_t t, int64_t b) const {
    return naive::Walk{shape, packed() ? batch_sizes.data() : nullptr, nullptr}.row(t, b);
  }

  // Strides and number of elements of a tensor with this many features.
  int64_t stride_t(int64_t features) const {
    return packed() || batch_first ? features + gap : (features + gap) * shape.B;
  }
  int64_t stride_b(int64_t features) const { return batch_first ? (features + gap) * shape.T : features + gap; }
  int64_t elements(int64_t features) const { return shape.rows ? (shape.rows - 1) * (features + gap) + features : 0; }
  int64_t offset(int64_t features, int64_t t, int64_t b) const {
    return packed() ? row(t, b) * stride_t(features) : t * stride_t(features) + b * stride_b(features);
  }
  template <class Pointer>
  RowTensor<Pointer> view(const Buffer& buffer, int64_t features) const {
    return {buffer.get(), stride_t(features), packed() ? 0 : stride_b(features), buffer.dtype()};
  }

  std::string text() const {
    static const char* const dtypes[] = {"f32", "f64", "bf16", "f16"};
    const LayerShape& s = shape;
    char line[500];
    std::snprintf(line, sizeof line,
                  "%s %s%s%s (x %s weights %s h0 %s c0 %s h %s c %s) %s T=%d B=%d I=%d H=%d P=%d D=%d threads=%d %s "
                  "bias=%d h0=%d c0=%d save=%d prepacked=%d "
                  "deterministic=%d dy=%d dh_n=%d dc_n=%d batch_first=%d gap=%d bptt=%d resets=%d cells=%d dcells=%d",
                  mode_name(s.cell), dtypes[int(s.dtype)], s.narrow ? " narrow" : "", s.one_step ? " one step" : "",
                  dtypes[int(types.x)], dtypes[int(types.weights)], dtypes[int(types.h0)], dtypes[int(types.c0)],
                  dtypes[int(types.h)], dtypes[int(types.c)], isa_name(isa), int(s.T), int(s.B), int(s.I), int(s.H),
                  int(s.P), s.D, threads,
                  packed()          ? "packed"
                  : lengths.empty() ? "padded"
                                    : "lengths",
                  bias, h0, c0, save, prepacked, deterministic, dy, dh_n, dc_n, batch_first, int(gap), int(bptt_steps),
                  !resets.empty(), cells, dcells);
    return line;
  }
};

inline Case random_case(Random& random, const std::vector<Isa>& isas) {
  static const int64_t sizes[] = {1, 2, 3, 5, 8, 16, 17, 33, 40};
  Case c;
  LayerShape& s = c.shape;
  s.cell = kCellKinds[random() % std::size(kCellKinds)];
  s.dtype = static_cast<DType>(random() % 4);
  s.H = pick(random, sizes), s.I = pick(random, sizes), s.B = pick(random, sizes);
  s.T = pick(random, {0, 1, 1, 2, 3, 5, 9, 13});
  if (chance(random, 0.02)) s.B = 0;
  if (chance(random, 0.02)) s.I = 0;
  s.P = s.cell == CellKind::lstm && s.H > 1 && chance(random, 0.4) ? 1 + int64_t(random() % uint64_t(s.H - 1)) : 0;
  s.D = 1 + int(random() % 2);
  if (chance(random, 0.03)) {  // more steps than a chunk of time steps can have
    s.T = 390 + int64_t(random() % 20), s.B = 1 + int64_t(random() % 2), s.H = std::min<int64_t>(s.H, 8);
    s.I = std::min<int64_t>(s.I, 8), s.P = s.P ? 1 : 0;
    if (s.H == 1) s.P = 0;
  } else if (chance(random, 0.06)) {  // several chunks of time steps, and enough work in each step to split it
    const bool by_rows = chance(random, 0.5);
    s.H = pick(random, {33, 40}), s.I = pick(random, {3, 40});
    s.B = by_rows ? pick(random, {33, 35}) : pick(random, {11, 13});
    s.T = (800 + int64_t(random() % 100)) / s.B;
    if (s.P) s.P = 17;
  } else if (chance(random, 0.25)) {  // enough work for each way of splitting it over threads
    s.H = pick(random, {33, 40, 65}), s.B = pick(random, {3, 8, 17, 33, 70}), s.T = pick(random, {5, 13});
    if (s.P) s.P = 17;
  }
  c.isa = isas[random() % isas.size()];
  // For which layer_isa() takes the kernels that multiply bf16.
  if (bf16_products(c.isa) != Bf16Products::as_float && chance(random, 0.8)) s.dtype = DType::bf16;
  s.one_step = s.T == 1 && chance(random, 0.5);
  s.narrow = (s.dtype == DType::bf16 || s.dtype == DType::f16) && chance(random, 0.7);
  const bool mixed = s.dtype != DType::f64 && chance(random, 0.3);  // a dtype for each tensor, as under autocast
  const auto dtype = [&] { return mixed ? pick(random, {DType::f32, DType::bf16, DType::f16}) : s.dtype; };
  c.types = {dtype(), dtype(), dtype(), dtype(), dtype(), dtype()};
  c.threads = 1 + int(random() % 4);
  for (bool* flag :
       {&c.bias, &c.h0, &c.c0, &c.save, &c.dy, &c.dh_n, &c.dc_n, &c.need_x, &c.need_state, &c.need_weights}) {
    *flag = chance(random, 0.75);
  }
  if (s.T * s.B > 2 * 384) c.need_weights = chance(random, 0.5);  // several chunks, often with frozen weights
  for (bool* flag : {&c.prepacked, &c.deterministic, &c.gate_grads}) *flag = chance(random, 0.3);
  c.prepacked = c.prepacked && c.types.weights == s.dtype;
  c.gap = pick(random, {0, 0, 0, 3});
  if (chance(random, 0.3)) c.bptt_steps = 1 + int64_t(random() % 4);

  std::vector<int64_t> lengths(static_cast<size_t>(s.B));
  const auto longest = uint64_t(chance(random, 0.2) ? std::min<int64_t>(1, s.T) : s.T);
  for (int64_t& n : lengths) n = int64_t(random() % (longest + 1));
  const double form = std::uniform_real_distribution<double>()(random);
  if (form < 0.25 && s.T && s.B) {
    std::sort(lengths.rbegin(), lengths.rend());
    for (int64_t& n : lengths) n = std::max<int64_t>(n, 1);
    lengths[0] = s.T;
    for (int64_t t = 0; t < s.T; ++t) {
      c.batch_sizes.push_back(std::count_if(lengths.begin(), lengths.end(), [&](int64_t n) { return n > t; }));
    }
    s.rows = 0;
    for (int64_t n : c.batch_sizes) s.rows += n;
  } else {
    if (form < 0.6 && s.B) c.lengths = lengths;
    c.batch_first = chance(random, 0.4);
    s.rows = s.T * s.B;
  }
  if (!s.one_step && chance(random, 0.3)) {
    const double share = pick(random, {0.02, 0.3, 1.0});
    for (int64_t row = 0; row < s.rows; ++row) c.resets.push_back(chance(random, share));
  }
  c.cells = s.cell == CellKind::lstm && chance(random, 0.3);
  c.dcells = s.cell == CellKind::lstm && chance(random, 0.3);
  return c;
}

// Two threads share the batch, the time steps make several chunks, and one sequence joins at the second chunk of the
// backward. So the rows move, by an odd number of rows with 35 sequences, and as every second row is the other
// thread's, only a barrier keeps a thread from overwriting what the other still reads of the first chunk. random_case()
// draws too few such cases.
inline Case chunks_split_by_rows(CellKind cell, Isa isa) {
  Case c;
  LayerShape& s = c.shape;
  s.cell = cell, s.dtype = DType::f32;
  s.T = 24, s.B = 35, s.I = 3, s.H = 40, s.D = 1, s.rows = s.T * s.B;
  c.types = {s.dtype, s.dtype, s.dtype, s.dtype, s.dtype, s.dtype};
  c.isa = isa, c.threads = 2;
  c.lengths.assign(static_cast<size_t>(s.B), s.T);
  c.lengths.back() = s.T - rnn_plan(s, isa, c.threads, true, false, false).chunk_steps;
  return c;
}

struct Inputs {
  Buffer x, h0, c0, weights[2][5];
  Buffer dy, dh_n, dc_n, dcells;

  Inputs(const Case& c, Random& random) {
    const LayerShape& s = c.shape;
    const int64_t H = s.H, O = s.outputs(), GH = gate_count(s.cell) * H;
    const double scale = 1.2 / std::sqrt(static_cast<double>(H));
    const bool lstm = s.cell == CellKind::lstm;
    const auto make = [&](bool wanted, int64_t n, DType dtype, double size) {
      return wanted ? Buffer::random(n, dtype, random, size) : Buffer();
    };
    x = make(true, c.elements(s.I), c.types.x, 1.5);
    h0 = make(c.h0, s.D * s.B * O, c.types.h0, 1);
    c0 = make(c.c0 && lstm, s.D * s.B * H, c.types.c0, 1.5);
    for (int d = 0; d < s.D; ++d) {
      weights[d][0] = make(true, GH * s.I, c.types.weights, scale);
      weights[d][1] = make(true, GH * O, c.types.weights, scale);
      weights[d][2] = make(c.bias, GH, c.types.weights, 0.5);
      weights[d][3] = make(c.bias, GH, c.types.weights, 0.5);
      weights[d][4] = make(s.P > 0, s.P * H, c.types.weights, scale);
    }
    dy = make(c.dy, c.elements(s.D * O), c.types.h, 1);
    dh_n = make(c.dh_n, s.D * s.B * O, c.types.h, 1);
    dc_n = make(c.dc_n && lstm, s.D * s.B * H, c.types.c, 1);
    dcells = make(c.dcells, c.elements(s.D * H), c.types.c, 1);
  }
  Inputs() = default;

  DirectionWeights direction(int d) const {
    const auto& w = weights[d];
    return {w[0].dtype(), w[0].get(), w[1].get(), w[2].get(), w[3].get(), w[4].get()};
  }
};

// The StateTensor of a buffer.
template <class Pointer>
StateTensor<Pointer> state(const Buffer& buffer) {
  return {buffer.get(), buffer.dtype()};
}

struct Outputs {
  Buffer y, h_n, c_n, saved, cells;

  Outputs(const Case& c, bool save) {
    const LayerShape& s = c.shape;
    y = Buffer(c.elements(s.D * s.outputs()), c.types.h);
    h_n = Buffer(s.D * s.B * s.outputs(), c.types.h);
    if (s.cell == CellKind::lstm) c_n = Buffer(s.D * s.B * s.H, c.types.c);
    if (save) saved = Buffer(s.D * s.rows * s.record(), naive::compute_dtype(s.dtype));
    if (c.cells) cells = Buffer(c.elements(s.D * s.H), c.types.c);
  }
};

// The values of all saved records by the type that they have there: `fixed` are the multiples of 1/32767, `narrow` the
// others of 16 bits.
struct Records {
  Buffer whole, narrow, fixed;

  Records(const Case& c, const Buffer& saved) {
    const LayerShape& s = c.shape;
    if (!saved.get()) return;
    const auto parts = naive::record_parts(s);
    const int64_t rows = s.D * s.rows;
    const auto of = [&](const naive::RecordPart& part) {
      return part.fixed ? &fixed : part.dtype == naive::compute_dtype(s.dtype) ? &whole : &narrow;
    };
    int64_t count[3] = {};
    for (const auto& part : parts) count[of(part) - &whole] += rows * (part.end - part.begin);
    whole = Buffer(count[0], naive::compute_dtype(s.dtype));
    narrow = Buffer(count[1], s.dtype);
    fixed = Buffer(count[2], DType::f32);
    int64_t to[3] = {};
    for (int64_t row = 0; row < rows; ++row) {
      for (const auto& part : parts) {
        Buffer* into = of(part);
        for (int64_t i = part.begin; i < part.end; ++i) {
          const double value = naive::load_part(naive::record_at(s, saved.get(), row), part, i);
          naive::store(into->get(), to[into - &whole]++, into->dtype(), value);
        }
      }
    }
  }
};

struct Gradients {
  Buffer dx, dh0, dc0, weights[2][5], gates, projected;

  explicit Gradients(const Case& c) {
    const LayerShape& s = c.shape;
    const DType compute = naive::compute_dtype(s.dtype);
    const int64_t H = s.H, O = s.outputs(), GH = gate_count(s.cell) * H;
    const DType of_weights = c.types.weights;
    if (c.need_x) dx = Buffer(c.elements(s.I), c.types.x);
    if (c.need_state) {
      dh0 = Buffer(s.D * s.B * O, c.types.h0);
      if (s.cell == CellKind::lstm) dc0 = Buffer(s.D * s.B * H, c.types.c0);
    }
    for (int d = 0; c.need_weights && d < s.D; ++d) {
      weights[d][0] = Buffer(GH * s.I, of_weights);
      weights[d][1] = Buffer(GH * O, of_weights);
      if (c.bias) weights[d][2] = Buffer(GH, of_weights), weights[d][3] = Buffer(GH, of_weights);
      if (s.P) weights[d][4] = Buffer(s.P * H, of_weights);
    }
    if (c.gate_grads) {
      gates = Buffer(s.D * s.rows * gate_grad_slots(s.cell) * H, compute);
      if (s.P) projected = Buffer(s.D * s.rows * s.P, compute);
    }
  }
};

inline ForwardParams forward_params(const Case& c, const Inputs& in, const Outputs& out, const void* prepacked) {
  const LayerShape& s = c.shape;
  ForwardParams p{};
  p.shape = s;
  p.x = c.view<const void*>(in.x, s.I);
  p.h0 = state<const void*>(in.h0);
  p.c0 = state<const void*>(in.c0);
  for (int d = 0; d < s.D; ++d) p.weights[d] = in.direction(d);
  p.packed = prepacked;
  p.batch_sizes = c.packed() ? c.batch_sizes.data() : nullptr;
  p.lengths = c.lengths.empty() ? nullptr : c.lengths.data();
  p.resets = c.resets.empty() ? nullptr : c.resets.data();
  p.y = c.view<void*>(out.y, s.D * s.outputs());
  p.cells = c.view<void*>(out.cells, s.D * s.H);
  p.h_n = state<void*>(out.h_n);
  p.c_n = state<void*>(out.c_n);
  p.saved = out.saved.get();
  p.deterministic = c.deterministic;
  return p;
}

inline BackwardParams backward_params(const Case& c, const Inputs& in, const Outputs& out, const Gradients& grads) {
  const LayerShape& s = c.shape;
  BackwardParams p{};
  p.shape = s;
  p.x = c.view<const void*>(in.x, s.I);
  p.h0 = state<const void*>(in.h0);
  p.c0 = state<const void*>(in.c0);
  for (int d = 0; d < s.D; ++d) {
    const auto& w = grads.weights[d];
    p.weights[d] = in.direction(d);
    p.grads[d] = {w[0].get(), w[1].get(), w[2].get(), w[3].get(), w[4].get()};
  }
  p.batch_sizes = c.packed() ? c.batch_sizes.data() : nullptr;
  p.lengths = c.lengths.empty() ? nullptr : c.lengths.data();
  p.resets = c.resets.empty() ? nullptr : c.resets.data();
  p.dcells = c.view<const void*>(in.dcells, s.D * s.H);
  p.saved = out.saved.get();
  p.dy = c.view<const void*>(in.dy, s.D * s.outputs());
  p.dh_n = state<const void*>(in.dh_n);
  p.dc_n = state<const void*>(in.dc_n);
  p.bptt_steps = c.bptt_steps;
  p.dx = c.view<void*>(grads.dx, s.I);
  p.dh0 = state<void*>(grads.dh0);
  p.dc0 = state<void*>(grads.dc0);
  p.gate_grads = grads.gates.get();
  p.proj_grads = grads.projected.get();
  p.deterministic = c.deterministic;
  return p;
}

}  // namespace dlk
