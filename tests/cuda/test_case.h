// One case of the kernels' test: its name, the random layer that the name describes, and the layout of rows in memory.
//   cell:dtype:path:T:B:H:D:form:options, for example lstm:bf16:best:5:8:40:2:lengths:hb
// cell: lstm_cells is an lstm that also returns c of every step and takes the gradient of that.
// path: grid or steps forces that kind of plan; best is the plan for the GPU, a cluster where possible; small and
// smallgrid plan for a GPU with room for few groups, wide for one without clusters of the usual slices. form: padded,
// lengths or packed. options: b biases, h initial states and gradients of the final ones, k backward truncated every
// two steps, f batch first (and a gap between rows), g no gradient of y, n an h_0 that begins with a NaN all of whose
// bits are set, r resets, in the padding too, - none.
// The path `variant` is step by step with what these options add: l layer normalisation, d recurrent dropout, z zoneout
// by masks, e zoneout by rates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "rnn/cuda/gpu_limits.h"
#include "reference.h"
#include "test_arrays.h"

namespace dlk {

struct Options {
  CellKind cell;
  DType dtype;
  bool cells;
  std::string path, form, flags, text;
  int T, B, H, D;
  bool has(char flag) const { return flags.find(flag) != std::string::npos; }
};

inline Options parse(const std::string& text) {
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
  o.cells = part[0] == "lstm_cells";
  o.cell = static_cast<CellKind>(index(o.cells ? "lstm" : part[0], {"lstm", "gru", "rnn_tanh", "rnn_relu"}));
  o.dtype = static_cast<DType>(index(part[1], {"f32", "-", "bf16", "f16"}));
  o.path = part[2];
  o.T = std::stoi(part[3]), o.B = std::stoi(part[4]), o.H = std::stoi(part[5]), o.D = std::stoi(part[6]);
  o.form = part[7];
  o.flags = part[8];
  return o;
}

// The GPU that the kernels run on. The emulation has as many multiprocessors as an H200.
inline GpuLimits this_gpu() {
#ifdef __CUDACC__
  return gpu_limits(0);
#else
  return kH200;
#endif
}

// Runs a case of the path `variant` (variants_test.cpp) and tells whether it passed.
bool run_variant(const Options& options);

class Case {
 protected:
  explicit Case(const Options& options) : o(options), random_(12345) {
    G = gate_count(o.cell), S = saved_slots(o.cell), slots = gate_grad_slots(o.cell);
    make_problem();
    make_layout();
  }

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
      if (o.has('n')) p.h0[0] = std::numeric_limits<double>::quiet_NaN();
      p.dh_n = uniform(D * B * H, 1, o.dtype);
      if (o.cell == CellKind::lstm) {
        p.c0 = uniform(D * B * H, 1, o.dtype);
        p.dc_n = uniform(D * B * H, 1, o.dtype);
      }
    }
    if (!o.has('g')) p.dy = uniform(T * B * D * H, 1, o.dtype);
    if (o.cells) p.dcells = uniform(T * B * D * H, 1, o.dtype);
    for (size_t i = 0; o.has('r') && i < T * B; ++i) p.resets.push_back(random_() % 3 == 0);
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
      // The kernels clamp lengths to 0..T. Lengths outside check that no value is used unclamped.
      for (int64_t& n : lengths) n = n == o.T ? n + 7 : n == 0 ? -3 : n;
    }
    LayerShape shape{o.cell, o.dtype, o.T, o.B, 1, o.H, 0, o.D, rows, false, Weights::given, false};
    GpuLimits gpu = this_gpu();
    // With room for a few groups only, each group has several chunks of sequences.
    const bool clusters = o.path == "best" || o.path == "small" || o.path == "wide";
    const int of_cluster = ceil_div(o.H, slice_units(G, SliceWidth::cluster));
    const int of_grid = o.D * ceil_div(o.H, slice_units(G, SliceWidth::grid));
    for (int n = 1; n <= kMaxCluster; ++n) {
      if (!clusters || (o.path == "wide" && n == of_cluster)) gpu.clusters[n] = 0;
      if (o.path == "small") gpu.clusters[n] = 1;
    }
    // All blocks of a grid run at the same time. More than 32 have more threads than ThreadSanitizer supports. A grid
    // of small groups would be taken for a cluster with many chunks, if there were room for one.
    gpu.multiprocessors = o.path == "smallgrid" ? of_grid : o.path == "small" ? 1 : std::max(32, of_grid);
    if (o.path == "steps" || o.path == "variant") gpu.multiprocessors = 0;
    forward_plan = sequence_plan(shape, gpu, false, 16);
    backward_plan = sequence_plan(shape, gpu, true, 16);
    const char* const kinds[] = {"cluster", "grid", "steps"};
    for (const SequencePlan* plan : {&forward_plan, &backward_plan}) {
      const std::string forced = o.path == "variant" ? "steps" : o.path;
      if (!clusters && o.path != "smallgrid" && forced != kinds[plan->kind]) {
        std::fprintf(stderr, "%s: planned as %s\n", o.text.c_str(), kinds[plan->kind]);
        std::exit(1);
      }
      // run_shape() in emulated.py reads this line.
      std::printf("plan %s %s %d %d\n", plan == &forward_plan ? "forward" : "backward", kinds[plan->kind], plan->units,
                  plan->columns);
    }
  }

  // Launches kernels and waits for them.
  template <class Launch>
  void run_kernels(const Launch& launch) {
    Memory::to_gpu();
    int error = launch();
    if (!error) error = Memory::from_gpu();
    check(error);
  }
  void check(int error) {
    if (error) std::fprintf(stderr, "%s: CUDA error %d\n", o.text.c_str(), error), std::exit(1);
  }

  static void* at(const Array& array, size_t index) {
    return array.data() ? static_cast<char*>(array.data()) + index * array.item() : nullptr;
  }

  // Our error may be at most twice that of the plain implementation in the same dtype (`peer`), three times for
  // gradients, plus one eps of the largest value.
  bool compare(const char* name, const Values& ours, const Values& exact, const Values& peer, bool grad, DType stored) {
    double largest = 0, error = 0, theirs = 0;
    size_t worst = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      if (std::isnan(exact[i]) && std::isnan(ours[i])) continue;
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

  // The strides of a tensor with this many features per row; `elements` is its size, `place` the offset of row (t, b).
  struct Strides {
    int64_t t, b;
  };
  Strides strides(int64_t features, int64_t row_gap) const {
    const int64_t row = features + row_gap;
    if (packed) return {row, 0};
    return o.has('f') ? Strides{row, row * o.T} : Strides{row * o.B, row};
  }
  size_t elements(int64_t features, int64_t row_gap) const {
    return static_cast<size_t>((rows - 1) * (features + row_gap) + features);
  }
  size_t place(int64_t features, int64_t row_gap, int t, int b) const {
    const Strides s = strides(features, row_gap);
    return static_cast<size_t>(packed ? (first_row[t] + b) * s.t : t * s.t + b * s.b);
  }
  // The flags of `resets` in the order of the rows; empty if there are none.
  std::vector<uint8_t> flags_of_rows() const {
    std::vector<uint8_t> flags(p.resets.empty() ? 0 : static_cast<size_t>(rows));
    for (int t = 0; t < o.T && !flags.empty(); ++t) {
      for (int b = 0; b < o.B; ++b) {
        if (exists(t, b)) flags[first_row[t] + b] = p.resets[static_cast<size_t>(t) * o.B + b];
      }
    }
    return flags;
  }
  bool exists(int t, int b) const { return !packed || t < p.lengths[b]; }
  template <class Pointer>
  RowTensor<Pointer> view(const Array& array, int64_t features, int64_t row_gap) const {
    const Strides s = strides(features, row_gap);
    return {static_cast<Pointer>(array.data()), s.t, s.b, array.dtype()};
  }

  // Convert [T, B, features] to the layout of the case and back. Rows that the kernels must not read are NaN.
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

  Options o;
  std::mt19937_64 random_;
  int G, S, slots;
  reference::Problem p;
  bool packed;
  int64_t gap, rows;
  std::vector<int> first_row;
  std::vector<int64_t> batch_sizes, lengths;
  SequencePlan forward_plan, backward_plan;
};

}  // namespace dlk
