// Compares the CUDA kernels with the reference: under emulation or, compiled by nvcc, on a GPU.
//   kernels_test SHAPE...   where test_case.h describes the shapes
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "rnn/cuda/rows.h"
#include "rnn/cuda/steps.h"
#include "test_case.h"

namespace dlk {
namespace {

class Test : Case {
 public:
  explicit Test(const Options& options) : Case(options) {}

  bool run() {
    forward();
    backward();
    const reference::Result exact = reference::run<double>(p, [](double v) { return v; });
    const reference::Result peer = reference::run<float>(p, [&](double v) { return rounded(o.dtype, v); });
    bool ok = true;
    ok &= compare("y", packed_or_padded(y, o.D * o.H, gap), exact.y, peer.y, false, o.dtype);
    if (o.cells)
      ok &= compare("cells", packed_or_padded(cells, o.D * o.H, gap), exact.cells, peer.cells, false, o.dtype);
    ok &= compare("h_n", h_n.values(), exact.h_n, peer.h_n, false, o.dtype);
    if (o.cell == CellKind::lstm) ok &= compare("c_n", c_n.values(), exact.c_n, peer.c_n, false, o.dtype);
    for (const auto* of : {&dgates_rounded, &dgates_exact}) {
      ok &= compare("dgates", *of, exact.dgates, peer.dgates, true, of == &dgates_exact ? DType::f32 : o.dtype);
    }
    ok &= compare("dh0", dh0.values(), exact.dh0, peer.dh0, true, o.dtype);
    if (o.cell == CellKind::lstm) ok &= compare("dc0", dc0.values(), exact.dc0, peer.dc0, true, o.dtype);
    ok &= compare("h before", before, hidden_before(exact.y), hidden_before(peer.y), false, o.dtype);
    if (o.has('b')) {
      ok &= compare("db_ih", db_ih, exact.db_ih, peer.db_ih, true, o.dtype);
      ok &= compare("db_hh", db_hh, exact.db_hh, peer.db_hh, true, o.dtype);
    }
    return ok;
  }

 private:
  void forward() {
    const size_t GH = static_cast<size_t>(G) * o.H, states = static_cast<size_t>(o.D) * o.B * o.H;
    w_hh = Array(o.dtype, p.w_hh), b_ih = Array(o.dtype, p.b_ih), b_hh = Array(o.dtype, p.b_hh);
    h0 = Array(o.dtype, p.h0), c0 = Array(o.dtype, p.c0);
    if (o.has('n')) h0.set_all_bits(0);
    h_n = Array(o.dtype, states);
    if (o.cell == CellKind::lstm) c_n = Array(o.dtype, states);
    y = Array(o.dtype, elements(o.D * o.H, gap));
    if (o.cells) cells = Array(o.dtype, elements(o.D * o.H, gap));
    saved = Array(DType::f32, static_cast<size_t>(o.D) * rows * S * o.H);
    lengths_of_kernels = Numbers<int64_t>(lengths);
    resets = Numbers<uint8_t>(flags_of_rows());
    if (packed) {
      offsets = Numbers<int>(std::vector<int>(static_cast<size_t>(o.T) + 1));
      run_kernels([&] { return launch_offsets(batch_sizes.data(), o.T, offsets.data(), nullptr); });
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
    f.offsets = offsets.data();
    f.lengths = lengths_of_kernels.data();
    f.resets = resets.data();
    for (int d = 0; d < o.D; ++d) {
      gates[d] = to_rows(p.gates, static_cast<size_t>(d) * o.T * o.B * GH, DType::f32, GH, 0);
      f.gates[d] = view<const float*>(gates[d], static_cast<int64_t>(GH), 0);
      f.w_hh[d] = at(w_hh, d * GH * o.H);
      f.b_ih[d] = at(b_ih, d * GH);
      f.b_hh[d] = at(b_hh, d * GH);
    }
    f.h0 = h0.data(), f.c0 = c0.data();
    f.y = view<void*>(y, o.D * o.H, gap);
    f.cells = cells.data();
    f.h_n = h_n.data(), f.c_n = c_n.data();
    f.saved = static_cast<float*>(saved.data());
    f.saved_rows = rows;
    if (forward_plan.kind != SequencePlan::steps) {
      make_exchange(forward_plan);
      f.exchange = exchange.data();
      f.counters = counters.data();
      run_kernels([&] { return launch_sequence(f, o.dtype, forward_plan, nullptr); });
      return;
    }
    Array gates_h(DType::f32, static_cast<size_t>(o.B) * GH), state(DType::f32, states);
    for (size_t i = 0; i < states; ++i) {
      h_n.set(i, h0.empty() ? 0.0 : h0[i]);
      if (o.cell == CellKind::lstm) c_n.set(i, c0.empty() ? 0.0 : c0[i]);
      state.set(i, o.cell == CellKind::lstm ? c_n[i] : h_n[i]);
    }
    const ForwardSteps steps{packed ? batch_sizes.data() : nullptr, static_cast<float*>(gates_h.data()),
                             static_cast<float*>(state.data())};
    const auto multiply = [&](int d) {
      if (const int error = Memory::from_gpu()) return error;
      for (int b = 0; b < o.B; ++b) {
        for (size_t i = 0; i < GH; ++i) {
          double sum = 0;
          for (int k = 0; k < o.H; ++k) {
            sum += w_hh[(d * GH + i) * o.H + k] * h_n[(static_cast<size_t>(d) * o.B + b) * o.H + k];
          }
          gates_h.set(b * GH + i, sum);
        }
      }
      Memory::to_gpu();
      return 0;
    };
    run_kernels([&] { return run_forward_steps(f, steps, o.dtype, multiply, nullptr); });
  }

  void backward() {
    const size_t GH = static_cast<size_t>(G) * o.H, states = static_cast<size_t>(o.D) * o.B * o.H;
    const int64_t features = static_cast<int64_t>(slots) * o.H;
    const bool by_steps = backward_plan.kind == SequencePlan::steps;
    const Array dy = p.dy.empty() ? Array() : to_rows(p.dy, 0, o.dtype, static_cast<size_t>(o.D) * o.H, gap);
    const Array dcells =
        p.dcells.empty() ? Array() : to_rows(p.dcells, 0, o.dtype, static_cast<size_t>(o.D) * o.H, gap);
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
    q.offsets = offsets.data();
    q.lengths = lengths_of_kernels.data();
    q.resets = resets.data();
    q.h0 = h0.data(), q.c0 = c0.data();
    q.dy = view<const void*>(dy, o.D * o.H, gap);
    q.dcells = view<const void*>(dcells, o.D * o.H, gap);
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
      q.counters = counters.data();
      run_kernels([&] { return launch_sequence(q, o.dtype, backward_plan, nullptr); });
    } else {
      Array hidden(o.dtype, Values(states * G, 0.0)), product(DType::f32, static_cast<size_t>(o.B) * o.H);
      Array carry(DType::f32, p.dh_n.empty() ? Values(states, 0.0) : p.dh_n);
      Array dc(DType::f32, p.dc_n.empty() ? Values(states, 0.0) : p.dc_n);
      const BackwardSteps steps{packed ? batch_sizes.data() : nullptr, hidden.data(),
                                static_cast<float*>(product.data()), static_cast<float*>(carry.data()),
                                static_cast<float*>(dc.data())};
      const auto multiply = [&](int d) {
        if (const int error = Memory::from_gpu()) return error;
        for (int b = 0; b < o.B; ++b) {
          for (int k = 0; k < o.H; ++k) {
            double sum = 0;
            for (size_t i = 0; i < GH; ++i) {
              sum += w_hh[(d * GH + i) * o.H + k] * hidden[(static_cast<size_t>(d) * o.B + b) * GH + i];
            }
            product.set(static_cast<size_t>(b) * o.H + k, sum);
          }
        }
        Memory::to_gpu();
        return 0;
      };
      run_kernels([&] { return run_backward_steps(q, steps, o.dtype, multiply, nullptr); });
    }
    db_ih.clear(), db_hh.clear(), before.clear();
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
      Array rows_before(o.dtype, elements(o.H, gap));
      const HiddenBefore hidden{o.cell,
                                o.T,
                                o.B,
                                o.H,
                                q.offsets,
                                q.lengths,
                                q.resets,
                                d == 1,
                                q.saved + d * rows * S * o.H,
                                at(h0, static_cast<size_t>(d) * o.B * o.H),
                                view<void*>(rows_before, o.H, gap)};
      run_kernels([&] { return launch_hidden_before(hidden, o.dtype, nullptr); });
      for (double v : packed_or_padded(rows_before, o.H, gap)) before.push_back(v);
      if (!o.has('b')) continue;
      Array ih(o.dtype, GH), hh(o.dtype, GH);
      const BiasSums bias{o.cell, o.H, tiles, o.D * features, q.bias_sums + d * features, ih.data(), hh.data()};
      run_kernels([&] { return launch_bias_sums(bias, o.dtype, nullptr); });
      for (double v : ih.values()) db_ih.push_back(v);
      for (double v : hh.values()) db_hh.push_back(v);
    }
  }

  // The h before each step, [D, T, B, H], from the h after each step, [T, B, D*H]. It is 0 past the end of a
  // sequence and where the step is reset.
  Values hidden_before(const Values& after) const {
    Values all;
    for (int d = 0; d < o.D; ++d) {
      for (int t = 0; t < o.T; ++t) {
        for (int b = 0; b < o.B; ++b) {
          const int from = d == 0 ? t - 1 : t + 1, length = p.lengths[b];
          for (int j = 0; j < o.H; ++j) {
            double h = 0;
            const bool has_state = t < length && !p.is_reset(d, t, b);
            if (has_state && from >= 0 && from < length) {
              h = after[((static_cast<size_t>(from) * o.B + b) * o.D + d) * o.H + j];
            } else if (has_state && !p.h0.empty()) {
              h = p.h0[(static_cast<size_t>(d) * o.B + b) * o.H + j];
            }
            all.push_back(h);
          }
        }
      }
    }
    return all;
  }

  void make_exchange(const SequencePlan& plan) {
    const bool grid = plan.kind == SequencePlan::grid;
    exchange =
        Array(o.dtype, grid ? static_cast<size_t>(kGridBuffers) * plan.groups * plan.tile * plan.layout.stride : 0);
    counters = Numbers<unsigned>(std::vector<unsigned>(grid ? static_cast<size_t>(plan.groups) : 0));
  }

  Array w_hh, b_ih, b_hh, h0, c0, y, cells, h_n, c_n, saved, dh0, dc0, exchange;
  Numbers<int> offsets;
  Numbers<int64_t> lengths_of_kernels;
  Numbers<uint8_t> resets;
  Numbers<unsigned> counters;
  Values dgates_rounded, dgates_exact, before, db_ih, db_hh;
};

}  // namespace
}  // namespace dlk

int main(int argc, char** argv) {
  int failures = 0;
  for (int i = 1; i < argc; ++i) {
    std::printf("%s\n", argv[i]), std::fflush(stdout);  // the last line names a shape whose kernels hang
    const dlk::Options options = dlk::parse(argv[i]);
    failures += !(options.path == "variant" ? dlk::run_variant(options) : dlk::Test(options).run());
  }
  std::printf("%d shapes, %d failures\n", argc - 1, failures);
  return failures || argc < 2;
}
