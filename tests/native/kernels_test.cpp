// Compares the recurrent kernels with naive.h over random calls, without torch:
//   kernels_test [cases] [seed]
// Buffers have exactly the size that the kernels may use and are filled with NaN until they are written, scratch memory
// included. Meant to run under sanitizers.
#include <array>
#include <cstdlib>
#include <map>

#include "core/patience.h"
#include "core/runtime_flags.h"
#include "cases.h"
#include "check.h"
#include "pool.h"

namespace dlk {
namespace {

constexpr const char* kFixed = "saved, fixed";

// The tolerance covers the rounding of the storage type and that of sums in the compute type, which grow with T. The dx
// of two directions is a sum of two rounded parts, which may cancel. With `pairs` an operand may have been rounded to
// the bf16 neighbour that the oracle did not take.
void compare(const Case& c, const char* name, const Buffer& got, const Buffer& want, bool pairs) {
  const DType dtype = want.dtype();
  double largest = 0;
  for (int64_t i = 0; i < want.count(); ++i) largest = std::fmax(largest, std::fabs(want.at(i)));
  const double epsilon = c.shape.dtype == DType::f64 ? 0x1p-52 : 0x1p-23;
  const double relative = dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f16 ? 0x1p-10 : 0;
  double absolute = epsilon * (100 + 8 * static_cast<double>(c.shape.T)) * (1 + largest);
  if (pairs) absolute += 0x1p-9 * (1 + largest);
  if (c.shape.D == 2 && std::strcmp(name, "dx") == 0) absolute += 2 * relative * largest;
  if (std::strcmp(name, kFixed) == 0) absolute += 1 / 32767.0;
  for (int64_t i = 0; i < want.count(); ++i) {
    if (got.same_bits(i, want, i)) continue;  // includes the NaN of elements that neither has written
    const double a = got.at(i), b = want.at(i);
    const bool close = std::fabs(a - b) <= absolute + relative * std::fabs(b);
    CHECK(close, "%s[%d] = %.9g, want %.9g: %s", name, int(i), a, b, c.text().c_str());
    if (!close) return;
  }
}

void same_bits(const Case& c, const char* name, const Buffer& a, const Buffer& b) {
  for (int64_t i = 0; i < a.count(); ++i) {
    const bool same = a.same_bits(i, b, i);
    CHECK(same, "%s[%d] = %.9g alone, %.9g: %s", name, int(i), a.at(i), b.at(i), c.text().c_str());
    if (!same) return;
  }
}

using Name = std::array<const char*, 5>;
constexpr Name kWeightNames = {"dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr"};

template <class Compare>
void each_output(const Case& c, const Outputs& a, const Outputs& b, Compare compare) {
  compare("y", a.y, b.y);
  compare("h_n", a.h_n, b.h_n);
  compare("c_n", a.c_n, b.c_n);
  compare("cells", a.cells, b.cells);
  const Records left(c, a.saved), right(c, b.saved);
  compare("saved", left.whole, right.whole);
  compare("saved, narrow", left.narrow, right.narrow);
  compare(kFixed, left.fixed, right.fixed);
}

template <class Compare>
void each_gradient(const Gradients& a, const Gradients& b, Compare compare) {
  compare("dx", a.dx, b.dx);
  compare("dh0", a.dh0, b.dh0);
  compare("dc0", a.dc0, b.dc0);
  for (int d = 0; d < 2; ++d) {
    for (size_t i = 0; i < kWeightNames.size(); ++i) compare(kWeightNames[i], a.weights[d][i], b.weights[d][i]);
  }
  compare("gate_grads", a.gates, b.gates);
  compare("proj_grads", a.projected, b.projected);
}

// How often each plan ran, and whether with more than one thread. The test prints it as its coverage.
std::map<std::string, int> g_covered;

void remember(Weights weights) {
  static const char* const splits[] = {"serial", "rows", "units"};
  static const char* const recurrences[] = {"dot", "tiles"};
  const LastRun& run = rnn_last_run();
  const bool pairs = bf16_products(run.plan.isa) != Bf16Products::as_float;
  std::string key = weights == Weights::given ? "" : weights == Weights::bf16 ? "bf16 weights " : "int8 weights ";
  key += pairs ? isa_name(run.plan.isa) + std::string(" ") : "";
  key += std::string(run.backward ? "backward " : "forward ") + splits[run.plan.split];
  if (run.plan.split != Plan::serial && run.members < 2) key += " one member";
  key += std::string(" ") + recurrences[run.plan.recurrence];
  if (run.plan.directions_side_by_side) key += " side by side";
  ++g_covered[key];
}

Outputs forward(const Case& c, const Inputs& in, bool save) {
  Outputs out(c, save);
  Buffer prepacked;
  if (c.prepacked) {
    DirectionWeights weights[2] = {in.direction(0), c.shape.D == 2 ? in.direction(1) : DirectionWeights{}};
    const int64_t bytes = static_cast<int64_t>(rnn_packed_bytes(c.shape, c.isa));
    prepacked = Buffer((bytes + 1) / 2, DType::bf16);
    rnn_pack(c.shape, weights, c.isa, prepacked.get());
    CHECK(rnn_packed_matches(prepacked.get(), static_cast<size_t>(bytes), c.shape, c.isa), "%s", c.text().c_str());
    LayerShape other = c.shape;
    ++other.H;
    CHECK(!rnn_packed_matches(prepacked.get(), static_cast<size_t>(bytes), other, c.isa), "%s", c.text().c_str());
    CHECK(rnn_packed_weights(prepacked.get(), static_cast<size_t>(bytes)) == c.shape.weights, "%s", c.text().c_str());
  }
  rnn_forward(forward_params(c, in, out, prepacked.get()), Runtime{c.isa, c.threads, parallel});
  remember(c.shape.weights);
  return out;
}

Gradients backward(const Case& c, const Inputs& in, const Outputs& out) {
  Gradients grads(c);
  rnn_backward(backward_params(c, in, out, grads), Runtime{c.isa, c.threads, parallel});
  remember(Weights::given);
  return grads;
}

// Sequence b of a case as a separate case of batch size 1, and the rows of the batch's tensors that belong to it.
struct Alone {
  const Case& all;
  int64_t b, length;
  Case c;

  Alone(const Case& batch, int64_t sequence) : all(batch), b(sequence), length(batch.length(sequence)), c(batch) {
    c.shape.T = c.shape.rows = length;
    c.shape.B = 1;
    c.batch_sizes.clear();
    c.lengths.clear();
    c.batch_first = false;
    c.gap = 0;
    c.threads = 1;
    c.need_weights = c.gate_grads = false;
    if (batch.resets.empty()) return;
    c.resets.clear();
    for (int64_t t = 0; t < length; ++t) c.resets.push_back(batch.resets[static_cast<size_t>(batch.row(t, b))]);
  }
  Buffer rows(const Buffer& from, int64_t features) const {
    if (!from.get()) return {};
    Buffer to(length * features, from.dtype());
    for (int64_t t = 0; t < length; ++t) to.copy(t * features, from, all.offset(features, t, b), features);
    return to;
  }
  Buffer states(const Buffer& from, int64_t features) const {
    if (!from.get()) return {};
    Buffer to(all.shape.D * features, from.dtype());
    for (int d = 0; d < all.shape.D; ++d) to.copy(d * features, from, (d * all.shape.B + b) * features, features);
    return to;
  }
  Buffer saved(const Buffer& from) const {
    if (!from.get()) return {};
    const int64_t features = all.shape.record();
    Buffer to(all.shape.D * length * features, from.dtype());
    for (int d = 0; d < all.shape.D; ++d) {
      for (int64_t t = 0; t < length; ++t) {
        to.copy((d * length + t) * features, from, (d * all.shape.rows + all.row(t, b)) * features, features);
      }
    }
    return to;
  }
  Inputs inputs(const Inputs& in) const {
    const LayerShape& s = all.shape;
    Inputs own;
    own.x = rows(in.x, s.I);
    own.h0 = states(in.h0, s.outputs());
    own.c0 = states(in.c0, s.H);
    own.dy = rows(in.dy, s.D * s.outputs());
    own.dh_n = states(in.dh_n, s.outputs());
    own.dc_n = states(in.dc_n, s.H);
    own.dcells = rows(in.dcells, s.D * s.H);
    for (int d = 0; d < s.D; ++d) {
      for (int i = 0; i < 5; ++i) {
        const Buffer& w = in.weights[d][i];
        if (!w.get()) continue;
        own.weights[d][i] = Buffer(w.count(), w.dtype());
        own.weights[d][i].copy(0, w, 0, w.count());
      }
    }
    return own;
  }
};

// In deterministic mode a sequence has the same results in a batch as alone, bit for bit.
void check_alone(const Case& c, const Inputs& in, const Outputs& out, const Outputs& oracle, const Gradients& grads,
                 int64_t b) {
  const Alone alone(c, b);
  if (alone.length == 0) return;
  const LayerShape& s = c.shape;
  const Inputs own = alone.inputs(in);
  const Outputs got = forward(alone.c, own, c.save);
  same_bits(c, "y", got.y, alone.rows(out.y, s.D * s.outputs()));
  same_bits(c, "h_n", got.h_n, alone.states(out.h_n, s.outputs()));
  same_bits(c, "c_n", got.c_n, alone.states(out.c_n, s.H));
  same_bits(c, "cells", got.cells, alone.rows(out.cells, s.D * s.H));

  Outputs own_oracle(alone.c, true);
  own_oracle.saved = alone.saved(oracle.saved);
  const Gradients own_grads = backward(alone.c, own, own_oracle);
  same_bits(c, "dx", own_grads.dx, alone.rows(grads.dx, s.I));
  same_bits(c, "dh0", own_grads.dh0, alone.states(grads.dh0, s.outputs()));
  same_bits(c, "dc0", own_grads.dc0, alone.states(grads.dc0, s.H));
}

// With weights of fewer bits a float32 call has about the same results, whatever the number of threads, and in
// deterministic mode whatever the batch.
void check_narrow(const Case& call, const Inputs& in, const Outputs& oracle, Weights weights, int64_t b) {
  Case c = call;
  c.shape.weights = weights;
  c.prepacked = true, c.save = false;
  const Outputs out = forward(c, in, false);
  each_output(c, out, oracle, [&](const char* name, const Buffer& got, const Buffer& want) {
    double largest = 0, worst = 0;
    for (int64_t i = 0; i < got.count(); ++i) {
      if (got.same_bits(i, want, i)) continue;
      largest = std::fmax(largest, std::fabs(want.at(i)));
      const double difference = std::fabs(got.at(i) - want.at(i));
      worst = difference <= worst ? worst : difference;  // NaN counts as worse
    }
    CHECK(worst <= 0.1 * (1 + largest), "%s is wrong by %.9g with weights of %s: %s", name, worst,
          weights == Weights::bf16 ? "bf16" : "int8", c.text().c_str());
  });
  Case serial = c;
  serial.threads = 1;
  each_output(c, forward(serial, in, false), out,
              [&](const char* name, const Buffer& a, const Buffer& b) { same_bits(c, name, a, b); });
  const Alone alone(c, b);
  if (!c.deterministic || c.shape.B == 0 || alone.length == 0) return;
  same_bits(c, "y", forward(alone.c, alone.inputs(in), false).y, alone.rows(out.y, c.shape.D * c.shape.outputs()));
}

void run_case(const Case& c, Random& random) {
  const Inputs in(c, random);
  const auto in_pairs = [&](bool backward) {
    const Plan plan = rnn_plan(c.shape, c.isa, c.threads, backward, c.deterministic, c.prepacked);
    return bf16_products(plan.isa) != Bf16Products::as_float;
  };
  const bool pairs = in_pairs(false), backward_pairs = in_pairs(true);
  Outputs oracle(c, true);
  naive::forward(forward_params(c, in, oracle, nullptr), pairs);
  Outputs out = forward(c, in, c.save);
  if (!c.save) oracle.saved = Buffer();
  each_output(c, out, oracle,
              [&](const char* name, const Buffer& got, const Buffer& want) { compare(c, name, got, want, pairs); });

  // The backward gets the oracle's forward results, so that only its own error is measured.
  if (!c.save) {
    oracle = Outputs(c, true);
    naive::forward(forward_params(c, in, oracle, nullptr), pairs);
  }
  Gradients want(c);
  naive::backward(backward_params(c, in, oracle, want), backward_pairs);
  const Gradients grads = backward(c, in, oracle);
  each_gradient(grads, want,
                [&](const char* name, const Buffer& a, const Buffer& b) { compare(c, name, a, b, backward_pairs); });

  // No result depends on the number of threads.
  Case serial = c;
  serial.threads = 1;
  const auto equal = [&](const char* name, const Buffer& a, const Buffer& b) { same_bits(c, name, a, b); };
  if (c.threads > 1 || c.deterministic) {
    each_output(c, forward(serial, in, c.save), out, equal);
    each_gradient(backward(serial, in, oracle), grads, equal);
  }
  if (c.deterministic && c.shape.B) {
    check_alone(c, in, out, oracle, grads, int64_t(random() % uint64_t(c.shape.B)));
  }
  if (c.types.of_one(DType::f32) && c.shape.dtype == DType::f32) {
    oracle.saved = Buffer();
    const int64_t b = c.shape.B ? int64_t(random() % uint64_t(c.shape.B)) : 0;
    for (Weights weights : {Weights::bf16, Weights::int8}) check_narrow(c, in, oracle, weights, b);
  }
}

}  // namespace
}  // namespace dlk

int main(int argc, char** argv) {
  using namespace dlk;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1500;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  set_least_patience(20000);
  g_pool = Pool::one_each;
  for (CellKind cell : kCellKinds) {
    Random random(seed);
    run_case(chunks_split_by_rows(cell, available_isas().front()), random);
  }
  for (int i = 0; i < cases; ++i) {
    Random random(seed * 1000003 + static_cast<uint64_t>(i));
    const Case c = random_case(random, available_isas());
    g_pool = pick(random, {Pool::one_each, Pool::one_each, Pool::two_ranges, Pool::one_range, Pool::in_turn});
    set_poison(chance(random, 0.7));
    const int before = failures();
    run_case(c, random);
    if (failures() > before) std::printf("  case %d\n", i);
  }
  for (const auto& [plan, count] : g_covered) std::printf("%6d %s\n", count, plan.c_str());
  return report("kernels_test");
}
