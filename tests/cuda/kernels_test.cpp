// The CUDA kernels under emulation against the reference.
//   kernels_test SHAPE...   cell:dtype:path:T:B:H:D:form:options, for example lstm:bf16:best:5:8:40:2:lengths:hb
// path: grid or steps; best: what an H200 would take, a cluster where possible; small, smallgrid: on a GPU with room
// for few groups. form: padded, lengths, packed. options: b biases, h states given, k gradients cut every two steps, f
// batch first (and a gap between rows), g only final states' gradients, - none.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/rows.h"
#include "../../csrc/cuda/steps.h"
#include "../native/naive.h"
#include "emulation.h"
#include "reference.h"

namespace dlk {
namespace {

using Values = std::vector<double>;

// An array of a dtype of exactly its size, for the address sanitizer; every byte 0xff (a NaN) until it is written.
class Array {
 public:
  Array() = default;
  Array(DType dtype, size_t count) : dtype_(dtype), count_(count), bytes_(new char[count * item()]) {
    std::memset(bytes_.get(), 0xff, count * item());
  }
  Array(DType dtype, const Values& values) : Array(dtype, values.size()) {
    if (values.empty()) bytes_ = nullptr;
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  size_t item() const { return dtype_ == DType::f32 ? 4 : 2; }
  size_t count() const { return count_; }
  void* data() const { return bytes_.get(); }
  double operator[](size_t i) const { return naive::load(data(), static_cast<int64_t>(i), dtype_); }
  void set(size_t i, double value) { naive::store(data(), static_cast<int64_t>(i), dtype_, value); }
  Values values() const {
    Values all(count_);
    for (size_t i = 0; i < count_; ++i) all[i] = (*this)[i];
    return all;
  }

 private:
  DType dtype_ = DType::f32;
  size_t count_ = 0;
  std::unique_ptr<char[]> bytes_;
};

double rounded(DType dtype, double value) {
  Array one(dtype, 1);
  one.set(0, value);
  return one[0];
}

struct Options {
  CellKind cell;
  DType dtype;
  std::string path, form, flags, text;
  int T, B, H, D;
  bool has(char flag) const { return flags.find(flag) != std::string::npos; }
};

Options parse(const std::string& text) {
  std::vector<std::string> part(1);
  for (char c : text) {
    if (c == ':') {
      part.emplace_back();
    } else {
      part.back().push_back(c);
    }
  }
  if (part.size() != 9) {
    std::fprintf(stderr, "not a shape: %s\n", text.c_str());
    std::exit(2);
  }
  const auto index = [](const std::string& name, std::initializer_list<const char*> names) {
    int i = 0;
    for (const char* known : names) {
      if (name == known) return i;
      ++i;
    }
    std::fprintf(stderr, "unknown: %s\n", name.c_str());
    std::exit(2);
  };
  Options o;
  o.text = text;
  o.cell = static_cast<CellKind>(index(part[0], {"lstm", "gru", "rnn_tanh", "rnn_relu"}));
  o.dtype = static_cast<DType>(index(part[1], {"f32", "-", "bf16", "f16"}));
  o.path = part[2];
  o.T = std::stoi(part[3]), o.B = std::stoi(part[4]), o.H = std::stoi(part[5]), o.D = std::stoi(part[6]);
  o.form = part[7];
  o.flags = part[8];
  return o;
}

class Test {
 public:
  explicit Test(const Options& options) : o(options), random_(12345) {
    G = gate_count(o.cell), S = saved_slots(o.cell), slots = gate_grad_slots(o.cell);
    make_problem();
    make_layout();
  }

  bool run() {
    forward();
    backward();
    const reference::Result exact = reference::run<double>(p, [](double v) { return v; });
    const reference::Result peer = reference::run<float>(p, [&](double v) { return rounded(o.dtype, v); });
    bool ok = true;
    ok &= compare("y", packed_or_padded(y, o.D * o.H, gap), exact.y, peer.y, false, o.dtype);
    ok &= compare("h_n", h_n.values(), exact.h_n, peer.h_n, false, o.dtype);
    if (o.cell == CellKind::lstm) ok &= compare("c_n", c_n.values(), exact.c_n, peer.c_n, false, o.dtype);
    for (const auto* of : {&dgates_rounded, &dgates_exact}) {
      ok &= compare("dgates", *of, exact.dgates, peer.dgates, true, of == &dgates_exact ? DType::f32 : o.dtype);
    }
    ok &= compare("dh0", dh0.values(), exact.dh0, peer.dh0, true, o.dtype);
    if (o.cell == CellKind::lstm) ok &= compare("dc0", dc0.values(), exact.dc0, peer.dc0, true, o.dtype);
    if (o.has('b')) {
      ok &= compare("db_ih", db_ih, exact.db_ih, peer.db_ih, true, o.dtype);
      ok &= compare("db_hh", db_hh, exact.db_hh, peer.db_hh, true, o.dtype);
    }
    return ok;
  }

 private:
  Values uniform(size_t count, double scale, DType dtype) {
    std::uniform_real_distribution<double> next(-scale, scale);
    Values values(count);
    for (double& v : values) v = rounded(dtype, next(random_));
    return values;
  }

  void make_problem() {
    const size_t T = o.T, B = o.B, H = o.H, D = o.D;
    p.cell = o.cell;
    p.T = o.T, p.B = o.B, p.H = o.H, p.D = o.D;
    p.bptt_steps = o.has('k') ? 2 : 0;
    p.lengths.assign(B, o.T);
    if (o.form != "padded") {
      for (int& n : p.lengths) n = static_cast<int>(random_() % (T + 1));
      if (o.form == "packed") {
        std::sort(p.lengths.rbegin(), p.lengths.rend());
        for (int& n : p.lengths) n = std::max(n, 1);
        p.lengths[0] = o.T;
        for (int t = 0; t < o.T; ++t) {
          batch_sizes.push_back(std::count_if(p.lengths.begin(), p.lengths.end(), [&](int n) { return n > t; }));
        }
      }
    }
    p.gates = uniform(D * T * B * G * H, 1.5, DType::f32);
    p.w_hh = uniform(D * G * H * H, 1.5 / std::sqrt(o.H), o.dtype);
    if (o.has('b')) {
      p.b_ih = uniform(D * G * H, 0.5, o.dtype);
      p.b_hh = uniform(D * G * H, 0.5, o.dtype);
    }
    if (o.has('h')) {
      p.h0 = uniform(D * B * H, 1, o.dtype);
      p.dh_n = uniform(D * B * H, 1, o.dtype);
      if (o.cell == CellKind::lstm) {
        p.c0 = uniform(D * B * H, 1, o.dtype);
        p.dc_n = uniform(D * B * H, 1, o.dtype);
      }
    }
    if (!o.has('g')) p.dy = uniform(T * B * D * H, 1, o.dtype);
  }

  void make_layout() {
    packed = o.form == "packed";
    gap = o.has('f') ? 3 : 0;
    rows = 0;
    for (int t = 0; t < o.T; ++t) {
      first_row.push_back(static_cast<int>(rows));
      rows += packed ? batch_sizes[t] : o.B;
    }
    first_row.push_back(static_cast<int>(rows));
    if (o.form == "lengths") {
      for (int n : p.lengths) lengths.push_back(n);
      // The kernel clamps: of these no value may be used as it is.
      for (int64_t& n : lengths) n = n == o.T ? n + 7 : n == 0 ? -3 : n;
    }
    LayerShape shape{o.cell, o.dtype, o.T, o.B, 1, o.H, 0, o.D, rows};
    GpuLimits gpu = kH200;
    // Room for a few groups only, so that each has several chunks of sequences to walk.
    const int units = slice_shape(G, o.dtype != DType::f32, false, false).units;
    if (o.path == "small") gpu.clusters_8 = gpu.clusters_16 = 1;
    if (o.path == "smallgrid") gpu.multiprocessors = o.D * ceil_div(o.H, units);
    const bool clusters = o.path == "best" || o.path == "small";
    if (!clusters) gpu.clusters_8 = gpu.clusters_16 = 0;
    if (o.path == "steps") gpu.multiprocessors = 0;
    forward_plan = sequence_plan(shape, gpu, false, 16);
    backward_plan = sequence_plan(shape, gpu, true, 16);
    const char* const kinds[] = {"cluster", "grid", "steps"};
    for (const SequencePlan* plan : {&forward_plan, &backward_plan}) {
      if (!clusters && o.path != "smallgrid" && o.path != kinds[plan->kind]) {
        std::fprintf(stderr, "%s: planned as %s\n", o.text.c_str(), kinds[plan->kind]);
        std::exit(1);
      }
    }
  }

  // A tensor of rows with these features: where row (t, b) begins, and how many elements it has in all.
  RowTensor<int64_t> strides(int64_t features, int64_t row_gap) const {
    const int64_t row = features + row_gap;
    if (packed) return {0, row, 0};
    return o.has('f') ? RowTensor<int64_t>{0, row, row * o.T} : RowTensor<int64_t>{0, row * o.B, row};
  }
  size_t elements(int64_t features, int64_t row_gap) const {
    return static_cast<size_t>((rows - 1) * (features + row_gap) + features);
  }
  size_t place(int64_t features, int64_t row_gap, int t, int b) const {
    const RowTensor<int64_t> s = strides(features, row_gap);
    return static_cast<size_t>(packed ? (first_row[t] + b) * s.t : t * s.t + b * s.b);
  }
  bool exists(int t, int b) const { return !packed || t < p.lengths[b]; }
  template <class Pointer>
  RowTensor<Pointer> view(const Array& array, int64_t features, int64_t row_gap) const {
    const RowTensor<int64_t> s = strides(features, row_gap);
    return {static_cast<Pointer>(array.data()), s.t, s.b};
  }

  // From [T, B, features] to rows and back; rows that must not be read are NaN.
  Array to_rows(const Values& values, size_t begin, DType dtype, size_t features, int64_t row_gap) const {
    Array array(dtype, elements(static_cast<int64_t>(features), row_gap));
    for (int t = 0; t < o.T; ++t) {
      for (int b = 0; b < o.B; ++b) {
        for (size_t i = 0; t < p.lengths[b] && i < features; ++i) {
          array.set(place(static_cast<int64_t>(features), row_gap, t, b) + i,
                    values[begin + (static_cast<size_t>(t) * o.B + b) * features + i]);
        }
      }
    }
    return array;
  }
  Values packed_or_padded(const Array& array, int64_t features, int64_t row_gap) const {
    Values values(static_cast<size_t>(o.T) * o.B * features, 0.0);
    for (int t = 0; t < o.T; ++t) {
      for (int b = 0; b < o.B; ++b) {
        for (int64_t i = 0; exists(t, b) && i < features; ++i) {
          values[(static_cast<size_t>(t) * o.B + b) * features + i] = array[place(features, row_gap, t, b) + i];
        }
      }
    }
    return values;
  }

  void check(int error) {
    if (error) std::fprintf(stderr, "%s: CUDA error %d\n", o.text.c_str(), error), std::exit(1);
  }

  void forward() {
    const size_t GH = static_cast<size_t>(G) * o.H, states = static_cast<size_t>(o.D) * o.B * o.H;
    w_hh = Array(o.dtype, p.w_hh), b_ih = Array(o.dtype, p.b_ih), b_hh = Array(o.dtype, p.b_hh);
    h0 = Array(o.dtype, p.h0), c0 = Array(o.dtype, p.c0);
    h_n = Array(o.dtype, states);
    if (o.cell == CellKind::lstm) c_n = Array(o.dtype, states);
    y = Array(o.dtype, elements(o.D * o.H, gap));
    if (S) saved = Array(DType::f32, static_cast<size_t>(o.D) * rows * S * o.H);
    offsets = std::make_unique<int[]>(static_cast<size_t>(o.T) + 1);
    if (packed) {
      check(launch_offsets(batch_sizes.data(), o.T, offsets.get(), nullptr));
      for (int t = 0; t <= o.T; ++t) {
        if (offsets[t] != first_row[t]) std::fprintf(stderr, "%s: offsets differ\n", o.text.c_str()), std::exit(1);
      }
    }
    Array gates[2];
    SequenceForward f{};
    f.cell = o.cell;
    f.T = o.T, f.B = o.B, f.H = o.H, f.D = o.D;
    f.tile = forward_plan.tile;
    f.layout = forward_plan.layout;
    f.offsets = packed ? offsets.get() : nullptr;
    f.lengths = lengths.empty() ? nullptr : lengths.data();
    for (int d = 0; d < o.D; ++d) {
      gates[d] = to_rows(p.gates, static_cast<size_t>(d) * o.T * o.B * GH, DType::f32, GH, 0);
      f.gates[d] = view<const float*>(gates[d], static_cast<int64_t>(GH), 0);
      f.w_hh[d] = at(w_hh, d * GH * o.H);
      f.b_ih[d] = at(b_ih, d * GH);
      f.b_hh[d] = at(b_hh, d * GH);
    }
    f.h0 = h0.data(), f.c0 = c0.data();
    f.y = view<void*>(y, o.D * o.H, gap);
    f.h_n = h_n.data(), f.c_n = c_n.data();
    f.saved = static_cast<float*>(saved.data());
    f.saved_rows = rows;
    if (forward_plan.kind != SequencePlan::steps) {
      make_exchange(forward_plan);
      f.exchange = exchange.data();
      f.counters = counters.get();
      check(launch_sequence(f, o.dtype, forward_plan, nullptr));
      return;
    }
    Array gates_h(DType::f32, static_cast<size_t>(o.B) * GH), state(DType::f32, states);
    for (size_t i = 0; i < states; ++i) {
      h_n.set(i, h0.data() ? h0[i] : 0.0);
      if (o.cell == CellKind::lstm) c_n.set(i, c0.data() ? c0[i] : 0.0);
      state.set(i, o.cell == CellKind::lstm ? c_n[i] : h_n[i]);
    }
    const ForwardSteps steps{packed ? batch_sizes.data() : nullptr, static_cast<float*>(gates_h.data()),
                             static_cast<float*>(state.data())};
    const auto multiply = [&](int d) {
      for (int b = 0; b < o.B; ++b) {
        for (size_t i = 0; i < GH; ++i) {
          double sum = 0;
          for (int k = 0; k < o.H; ++k) {
            sum += w_hh[(d * GH + i) * o.H + k] * h_n[(static_cast<size_t>(d) * o.B + b) * o.H + k];
          }
          gates_h.set(b * GH + i, sum);
        }
      }
      return 0;
    };
    check(run_forward_steps(f, steps, o.dtype, multiply, nullptr));
  }

  void backward() {
    const size_t GH = static_cast<size_t>(G) * o.H, states = static_cast<size_t>(o.D) * o.B * o.H;
    const int64_t features = static_cast<int64_t>(slots) * o.H;
    const bool by_steps = backward_plan.kind == SequencePlan::steps;
    const Array dy = p.dy.empty() ? Array() : to_rows(p.dy, 0, o.dtype, static_cast<size_t>(o.D) * o.H, gap);
    const Array dh_n(o.dtype, p.dh_n), dc_n(o.dtype, p.dc_n);
    Array dgates[2];
    const int tiles = by_steps ? ceil_div(o.B, kSegmentRows) : backward_plan.groups / o.D;
    Array sums(DType::f32, static_cast<size_t>(tiles) * o.D * features);
    Array gate_grads(DType::f32, static_cast<size_t>(o.D) * rows * features);
    dh0 = Array(o.dtype, states);
    if (o.cell == CellKind::lstm) dc0 = Array(o.dtype, states);

    SequenceBackward q{};
    q.cell = o.cell;
    q.T = o.T, q.B = o.B, q.H = o.H, q.D = o.D;
    q.tile = backward_plan.tile;
    q.layout = backward_plan.layout;
    q.offsets = packed ? offsets.get() : nullptr;
    q.lengths = lengths.empty() ? nullptr : lengths.data();
    q.h0 = h0.data(), q.c0 = c0.data();
    q.y = view<const void*>(y, o.D * o.H, gap);
    q.dy = view<const void*>(dy, o.D * o.H, gap);
    q.saved = static_cast<const float*>(saved.data());
    q.saved_rows = rows;
    q.dh_n = dh_n.data(), q.dc_n = dc_n.data();
    q.bptt_steps = p.bptt_steps;
    for (int d = 0; d < o.D; ++d) {
      q.w_hh[d] = at(w_hh, d * GH * o.H);
      dgates[d] = Array(o.dtype, elements(features, gap));
      q.dgates[d] = view<void*>(dgates[d], features, gap);
    }
    q.gate_grads = static_cast<float*>(gate_grads.data());
    q.dh0 = dh0.data(), q.dc0 = dc0.data();
    if (o.has('b')) q.bias_sums = static_cast<float*>(sums.data());
    if (!by_steps) {
      make_exchange(backward_plan);
      q.exchange = exchange.data();
      q.counters = counters.get();
      check(launch_sequence(q, o.dtype, backward_plan, nullptr));
    } else {
      Array hidden(o.dtype, Values(states * G, 0.0)), product(DType::f32, static_cast<size_t>(o.B) * o.H);
      Array carry(DType::f32, p.dh_n.empty() ? Values(states, 0.0) : p.dh_n);
      Array dc(DType::f32, p.dc_n.empty() ? Values(states, 0.0) : p.dc_n);
      const BackwardSteps steps{packed ? batch_sizes.data() : nullptr, hidden.data(),
                                static_cast<float*>(product.data()), static_cast<float*>(carry.data()),
                                static_cast<float*>(dc.data())};
      const auto multiply = [&](int d) {
        for (int b = 0; b < o.B; ++b) {
          for (int k = 0; k < o.H; ++k) {
            double sum = 0;
            for (size_t i = 0; i < GH; ++i) {
              sum += w_hh[(d * GH + i) * o.H + k] * hidden[(static_cast<size_t>(d) * o.B + b) * GH + i];
            }
            product.set(static_cast<size_t>(b) * o.H + k, sum);
          }
        }
        return 0;
      };
      check(run_backward_steps(q, steps, o.dtype, multiply, nullptr));
    }
    db_ih.clear(), db_hh.clear();
    dgates_rounded.assign(static_cast<size_t>(o.D) * o.T * o.B * features, 0.0);
    dgates_exact = dgates_rounded;
    for (int d = 0; d < o.D; ++d) {
      const Values one = packed_or_padded(dgates[d], features, gap);
      std::copy(one.begin(), one.end(), dgates_rounded.begin() + static_cast<ptrdiff_t>(d * one.size()));
      for (int t = 0; t < o.T; ++t) {
        for (int b = 0; b < o.B; ++b) {
          const size_t row = static_cast<size_t>(d) * rows + (packed ? first_row[t] + b : t * o.B + b);
          for (int64_t i = 0; exists(t, b) && i < features; ++i) {
            dgates_exact[((static_cast<size_t>(d) * o.T + t) * o.B + b) * features + i] =
                gate_grads[row * features + i];
          }
        }
      }
      if (!o.has('b')) continue;
      Array ih(o.dtype, GH), hh(o.dtype, GH);
      const BiasSums bias{o.cell, o.H, tiles, o.D * features, q.bias_sums + d * features, ih.data(), hh.data()};
      check(launch_bias_sums(bias, o.dtype, nullptr));
      for (double v : ih.values()) db_ih.push_back(v);
      for (double v : hh.values()) db_hh.push_back(v);
    }
  }

  void make_exchange(const SequencePlan& plan) {
    const bool grid = plan.kind == SequencePlan::grid;
    exchange = Array(o.dtype, grid ? static_cast<size_t>(2) * plan.groups * plan.tile * plan.layout.stride : 0);
    counters = std::make_unique<unsigned[]>(grid ? static_cast<size_t>(plan.groups) : 0);
  }

  static void* at(const Array& array, size_t index) {
    return array.data() ? static_cast<char*>(array.data()) + index * array.item() : nullptr;
  }

  // At most twice the error of the plain computation in the same dtype, three times for gradients, and one eps.
  bool compare(const char* name, const Values& ours, const Values& exact, const Values& peer, bool grad, DType stored) {
    double largest = 0, error = 0, theirs = 0;
    size_t worst = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      largest = std::max(largest, std::fabs(exact[i]));
      theirs = std::max(theirs, std::fabs(rounded(stored, peer[i]) - exact[i]));
      const double e = std::fabs(ours[i] - exact[i]);
      if (!(e <= error)) error = e, worst = i;
    }
    const double eps = o.dtype == DType::bf16 ? 0.0078125 : o.dtype == DType::f16 ? 0.0009765625 : 1.1920929e-7;
    const double limit = (grad ? 3 : 2) * theirs + eps * largest;
    if (error <= limit) return true;
    std::printf("%s: %s is off by %.3e, limit %.3e, at %zu of %zu: %.8g for %.8g\n", o.text.c_str(), name, error, limit,
                worst, exact.size(), ours[worst], exact[worst]);
    return false;
  }

  Options o;
  std::mt19937_64 random_;
  int G, S, slots;
  reference::Problem p;
  bool packed;
  int64_t gap, rows;
  std::vector<int> first_row;
  std::vector<int64_t> batch_sizes, lengths;
  SequencePlan forward_plan, backward_plan;
  Array w_hh, b_ih, b_hh, h0, c0, y, h_n, c_n, saved, dh0, dc0, exchange;
  std::unique_ptr<int[]> offsets;
  std::unique_ptr<unsigned[]> counters;
  Values dgates_rounded, dgates_exact, db_ih, db_hh;
};

}  // namespace
}  // namespace dlk

int main(int argc, char** argv) {
  int failures = 0;
  for (int i = 1; i < argc; ++i) failures += !dlk::Test(dlk::parse(argv[i])).run();
  std::printf("%d shapes, %d failures\n", argc - 1, failures);
  return failures || argc < 2;
}
