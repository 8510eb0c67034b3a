// Runs the kernels of layers with layer normalisation, zoneout and recurrent dropout over random calls, without torch:
//   variants_test [cases] [seed]
// Without any of the three they must compute what naive.h does for a plain layer. With them (the equations are tested
// in Python) no result may depend on the number of threads, all must be finite, and slots of 16 bits in the records may
// only round the gradients. Buffers and scratch memory are as in kernels_test. Meant to run under sanitizers.
#include <cstdlib>

#include "core/patience.h"
#include "core/runtime_flags.h"
#include "rnn/variants.h"
#include "cases.h"
#include "check.h"
#include "pool.h"

namespace dlk {
namespace {

struct VariantInputs {
  Variant variant{};
  Buffer dropout, gains[2][4];
  std::vector<uint8_t> mask_c, mask_h;
  bool bias_of_c;

  VariantInputs(const Case& c, bool neutral, Random& random) {
    const LayerShape& s = c.shape;
    const bool lstm = s.cell == CellKind::lstm;
    const int64_t GH = gate_count(s.cell) * s.H;
    bias_of_c = lstm && c.bias;
    variant.eps = 1e-5;
    if (neutral) return;
    variant.normalised = chance(random, 0.7);
    for (int d = 0; d < s.D && variant.normalised; ++d) {
      const int64_t sizes[] = {GH, GH, lstm ? s.H : 0, bias_of_c ? s.H : 0};
      for (int k = 0; k < 4; ++k)
        if (sizes[k]) gains[d][k] = Buffer::random(sizes[k], c.types.weights, random, 1);
      const auto& g = gains[d];
      variant.gains[d] = {g[0].dtype(), g[0].get(), g[1].get(), g[2].get(), g[3].get()};
    }
    if (chance(random, 0.5)) dropout = Buffer::random(s.D * s.B * s.H, naive::compute_dtype(s.dtype), random, 2);
    variant.dropout = dropout.get();
    const auto zoneout = [&](bool wanted, std::vector<uint8_t>* mask, const uint8_t** data, double* rate) {
      if (!wanted || chance(random, 0.3)) return;
      if (chance(random, 0.3)) {
        *rate = 0.25;
        return;
      }
      for (int64_t i = 0; i < s.D * s.rows * s.H; ++i) mask->push_back(chance(random, 0.4));
      *data = mask->data();
    };
    zoneout(lstm, &mask_c, &variant.mask_c, &variant.zoneout_c);
    zoneout(true, &mask_h, &variant.mask_h, &variant.zoneout_h);
  }
};

Outputs forward(const Case& c, const Inputs& in, const VariantInputs& of) {
  Outputs out(c, false);
  if (c.save)
    out.saved =
        Buffer(c.shape.D * c.shape.rows * variant_parts(c.shape, of.variant).size, naive::compute_dtype(c.shape.dtype));
  VariantForwardParams params{};
  params.layer = forward_params(c, in, out, nullptr);
  params.variant = of.variant;
  variant_forward(params, {c.isa, c.threads, parallel});
  return out;
}

struct GainGradients {
  Buffer of[2][4];
};

Gradients backward(const Case& c, const Inputs& in, const Outputs& out, const VariantInputs& of, GainGradients* gains) {
  Gradients grads(c);
  VariantBackwardParams params{};
  params.layer = backward_params(c, in, out, grads);
  params.variant = of.variant;
  for (int d = 0; d < c.shape.D && of.variant.normalised && c.need_weights; ++d) {
    for (int k = 0; k < 4; ++k)
      if (of.gains[d][k].get()) gains->of[d][k] = Buffer(of.gains[d][k].count(), c.types.weights);
    const auto& g = gains->of[d];
    params.gains[d] = {g[0].dtype(), g[0].get(), g[1].get(), g[2].get(), g[3].get()};
  }
  variant_backward(params, {c.isa, c.threads, parallel});
  return grads;
}

void close(const Case& c, const char* name, const Buffer& got, const Buffer& want, double rounding) {
  double largest = 0;
  for (int64_t i = 0; i < want.count(); ++i) largest = std::fmax(largest, std::fabs(want.at(i)));
  const DType dtype = want.dtype();
  const double relative = dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f16 ? 0x1p-10 : 0;
  const double epsilon = c.shape.dtype == DType::f64 ? 0x1p-52 : 0x1p-23;
  const double sums = epsilon * (100 + 8 * static_cast<double>(c.shape.T)) + rounding;
  for (int64_t i = 0; i < want.count(); ++i) {
    if (got.same_bits(i, want, i)) continue;  // includes the NaN of elements that neither has written
    const bool ok = std::fabs(got.at(i) - want.at(i)) <= (sums + relative) * (1 + largest);
    CHECK(ok, "%s[%d] = %.9g, want %.9g: %s", name, int(i), got.at(i), want.at(i), c.text().c_str());
    if (!ok) return;
  }
}

template <class Compare>
void each_result(const Outputs& a, const Outputs& b, const Gradients& left, const Gradients& right, Compare compare) {
  static const char* const names[] = {"dw_ih", "dw_hh", "db_ih", "db_hh"};
  compare("y", a.y, b.y);
  compare("h_n", a.h_n, b.h_n);
  compare("c_n", a.c_n, b.c_n);
  compare("dx", left.dx, right.dx);
  compare("dh0", left.dh0, right.dh0);
  compare("dc0", left.dc0, right.dc0);
  for (int d = 0; d < 2; ++d)
    for (int k = 0; k < 4; ++k) compare(names[k], left.weights[d][k], right.weights[d][k]);
}

void run_case(Case c, Random& random) {
  c.save = true, c.shape.one_step = false, c.gate_grads = false;
  c.resets.clear(), c.cells = c.dcells = false;  // these have no kernels here
  const bool neutral = chance(random, 0.4);
  const Inputs in(c, random);
  const VariantInputs of(c, neutral, random);
  GainGradients gains;
  const Outputs out = forward(c, in, of);
  const Gradients grads = backward(c, in, out, of, &gains);
  if (neutral) {
    const auto pairs = [&](bool backward) {
      return bf16_products(variant_plan(c.shape, c.isa, c.threads, backward).isa) != Bf16Products::as_float;
    };
    const Outputs plain(c, true);
    naive::forward(forward_params(c, in, plain, nullptr), pairs(false));
    const Gradients of_plain(c);
    naive::backward(backward_params(c, in, plain, of_plain), pairs(true));
    const double rounding = pairs(false) || pairs(true) || c.shape.narrow ? 0x1p-8 : 0;
    each_result(out, plain, grads, of_plain,
                [&](const char* name, const Buffer& a, const Buffer& b) { close(c, name, a, b, rounding); });
  }
  const auto finite = [&](const char* name, const Buffer& buffer, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const bool ok = std::isfinite(buffer.at(i));
      CHECK(ok, "%s[%d] = %.9g: %s", name, int(i), buffer.at(i), c.text().c_str());
      if (!ok) return;
    }
  };
  finite("h_n", out.h_n, out.h_n.count());
  for (int d = 0; d < 2; ++d)
    for (int k = 0; k < 4; ++k) {
      finite("dw", grads.weights[d][k], grads.weights[d][k].count());
      finite("gain", gains.of[d][k], gains.of[d][k].count());
    }

  if (c.shape.narrow) {
    Case whole = c;
    whole.shape.narrow = false;
    GainGradients of_whole;
    const Outputs other = forward(whole, in, of);
    const Gradients other_grads = backward(whole, in, other, of, &of_whole);
    // What is left where the backward of a normalisation cancels is multiplied by up to 1 / sqrt(eps).
    const double rounding = of.variant.normalised ? 0x1p-4 : 0x1p-8;
    each_result(out, other, grads, other_grads, [&](const char* name, const Buffer& a, const Buffer& b) {
      close(c, name, a, b, name[0] == 'd' ? rounding : 0);
    });
    for (int d = 0; d < 2; ++d)
      for (int k = 0; k < 4; ++k) close(c, "gain", gains.of[d][k], of_whole.of[d][k], rounding);
  }

  Case serial = c;
  serial.threads = 1;
  GainGradients alone;
  const Outputs again = forward(serial, in, of);
  const Gradients grads_again = backward(serial, in, again, of, &alone);
  const auto same = [&](const char* name, const Buffer& a, const Buffer& b) {
    for (int64_t i = 0; i < a.count(); ++i) {
      const bool ok = a.same_bits(i, b, i);
      CHECK(ok, "%s[%d] = %.9g alone, %.9g: %s", name, int(i), a.at(i), b.at(i), c.text().c_str());
      if (!ok) return;
    }
  };
  each_result(again, out, grads_again, grads, same);
  for (int d = 0; d < 2; ++d)
    for (int k = 0; k < 4; ++k) same("gain", alone.of[d][k], gains.of[d][k]);
}

}  // namespace
}  // namespace dlk

int main(int argc, char** argv) {
  using namespace dlk;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1500;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  set_least_patience(20000);
  for (int i = 0; i < cases; ++i) {
    Random random(seed * 1000003 + static_cast<uint64_t>(i));
    Case c = random_case(random, available_isas());
    if (c.shape.P || (c.shape.cell != CellKind::lstm && c.shape.cell != CellKind::gru)) continue;
    g_pool = pick(random, {Pool::one_each, Pool::one_each, Pool::two_ranges, Pool::one_range, Pool::in_turn});
    set_poison(chance(random, 0.7));
    const int before = failures();
    run_case(c, random);
    if (failures() > before) std::printf("  case %d\n", i);
  }
  return report("variants_test");
}
