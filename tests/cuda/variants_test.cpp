// Compares the CUDA kernels of layers with layer normalisation, zoneout and recurrent dropout with the reference. A
// part of the program of kernels_test.cpp.
#include "rnn/cuda/variant_steps.h"
#include "test_case.h"
#include "variant_reference.h"

namespace dlk {
namespace {

class VariantTest : Case {
 public:
  explicit VariantTest(const Options& options) : Case(options) {
    GH = static_cast<size_t>(G) * o.H;
    states = static_cast<size_t>(o.D) * o.B * o.H;
    lstm = o.cell == CellKind::lstm;
    make_variant();
  }

  bool run() {
    forward();
    backward();
    v.plain = p;
    const reference::VariantResult exact = reference::run_variant<double>(v, [](double x) { return x; });
    const reference::VariantResult peer =
        reference::run_variant<float>(v, [&](double x) { return rounded(o.dtype, x); });
    bool ok = true;
    ok &= compare("y", packed_or_padded(y, o.D * o.H, gap), exact.y, peer.y, false, o.dtype);
    ok &= compare("h_n", h_n.values(), exact.h_n, peer.h_n, false, o.dtype);
    ok &= compare("of_input", of_input, exact.of_input, peer.of_input, true, o.dtype);
    ok &= compare("of_hidden", of_hidden, exact.of_hidden, peer.of_hidden, true, o.dtype);
    ok &= compare("operand", operands, exact.operand, peer.operand, false, o.dtype);
    ok &= compare("dh0", dh0.values(), exact.dh0, peer.dh0, true, o.dtype);
    if (lstm) {
      ok &= compare("c_n", c_n.values(), exact.c_n, peer.c_n, false, o.dtype);
      ok &= compare("dc0", dc0.values(), exact.dc0, peer.dc0, true, o.dtype);
    }
    ok &= compare("db_ih", sums[0], exact.db_ih, peer.db_ih, true, o.dtype);
    ok &= compare("db_hh", sums[1], exact.db_hh, peer.db_hh, true, o.dtype);
    if (!v.normalised) return ok;
    ok &= compare("dg_ih", sums[2], exact.dg_ih, peer.dg_ih, true, DType::f32);
    ok &= compare("dg_hh", sums[3], exact.dg_hh, peer.dg_hh, true, DType::f32);
    if (!lstm) return ok;
    ok &= compare("dg_c", sums[4], exact.dg_c, peer.dg_c, true, DType::f32);
    ok &= compare("dc_bias", sums[5], exact.dc_bias, peer.dc_bias, true, DType::f32);
    return ok;
  }

 private:
  void make_variant() {
    v.normalised = o.has('l');
    v.eps = 1e-5;
    v.zoneout_c = o.has('e') ? 0.3 : 0;
    v.zoneout_h = o.has('e') ? 0.2 : 0;
    if (v.normalised) {
      v.g_ih = uniform(o.D * GH, 1.5, DType::f32), v.g_hh = uniform(o.D * GH, 1.5, DType::f32);
      if (lstm) v.g_c = uniform(o.D * o.H, 1.5, DType::f32);
      if (lstm && o.has('b')) v.c_bias = uniform(o.D * o.H, 0.5, DType::f32);
    }
    for (size_t i = 0; o.has('d') && i < states; ++i) v.dropout.push_back(random_() % 4 == 0 ? 0.0 : 1.25);
    for (size_t i = 0; o.has('z') && i < states * o.T; ++i) {
      if (lstm) v.mask_c.push_back(random_() % 3 == 0);
      v.mask_h.push_back(random_() % 3 == 0);
    }
    // Of float32, as the kernels read them.
    w_hh = Array(o.dtype, p.w_hh);
    b_ih = Array(DType::f32, p.b_ih), b_hh = Array(DType::f32, p.b_hh);
    g_ih = Array(DType::f32, v.g_ih), g_hh = Array(DType::f32, v.g_hh);
    g_c = Array(DType::f32, v.g_c), c_bias = Array(DType::f32, v.c_bias);
    dropout = Array(DType::f32, v.dropout);
    mask_c = in_rows(v.mask_c), mask_h = in_rows(v.mask_h);
    h0 = Array(o.dtype, p.h0), c0 = Array(o.dtype, p.c0);
    lengths_of_kernels = Numbers<int64_t>(lengths);
    layer.cell = o.cell;
    layer.T = o.T, layer.B = o.B, layer.H = o.H, layer.D = o.D;
    layer.rows = rows;
    layer.lengths = lengths_of_kernels.data();
    layer.mask_c = mask_c.data(), layer.mask_h = mask_h.data();
    if (packed) {
      layer.batch_sizes = batch_sizes.data();
      offsets = Numbers<int>(first_row);
      layer.offsets = offsets.data();
    }
    for (int d = 0; d < o.D; ++d) {
      StepVariant& variant = layer.variants[d];
      variant.normalised = v.normalised;
      variant.eps = static_cast<float>(v.eps);
      variant.zoneout_c = static_cast<float>(v.zoneout_c);
      variant.zoneout_h = static_cast<float>(v.zoneout_h);
      variant.b_ih = floats(b_ih, d * GH), variant.b_hh = floats(b_hh, d * GH);
      variant.gains = {DType::f32, floats(g_ih, d * GH), floats(g_hh, d * GH), floats(g_c, d * o.H),
                       floats(c_bias, d * o.H)};
      variant.dropout = floats(dropout, static_cast<size_t>(d) * o.B * o.H);
    }
    record = variant_record(o.cell, o.H, v.normalised);
  }

  // [D, T, B, H] in the order of the rows, [D, rows, H].
  Numbers<uint8_t> in_rows(const std::vector<bool>& mask) const {
    std::vector<uint8_t> all(mask.empty() ? 0 : static_cast<size_t>(o.D) * rows * o.H);
    for (size_t i = 0; i < mask.size(); ++i) {
      const int j = static_cast<int>(i % o.H), b = static_cast<int>(i / o.H % o.B);
      const int t = static_cast<int>(i / o.H / o.B % o.T), d = static_cast<int>(i / o.H / o.B / o.T);
      if (exists(t, b)) all[(static_cast<size_t>(d) * rows + first_row[t] + b) * o.H + j] = mask[i];
    }
    return Numbers<uint8_t>(all);
  }
  static float* floats(const Array& array, size_t index) { return static_cast<float*>(at(array, index)); }
  Values or_zeros(const Values& values) const { return values.empty() ? Values(states, 0.0) : values; }

  void forward() {
    Array gates[2], gates_h(DType::f32, static_cast<size_t>(o.B) * GH), operand;
    Array h(DType::f32, or_zeros(p.h0)), c(DType::f32, or_zeros(p.c0));
    h_n = Array(o.dtype, or_zeros(p.h0));
    if (lstm) c_n = Array(o.dtype, or_zeros(p.c0));
    y = Array(o.dtype, elements(o.D * o.H, gap));
    saved = Array(DType::f32, static_cast<size_t>(o.D) * rows * record);
    VariantForwardSteps f{};
    f.layer = layer;
    for (int d = 0; d < o.D; ++d) {
      gates[d] = to_rows(p.gates, static_cast<size_t>(d) * o.T * o.B * GH, DType::f32, GH, 0);
      f.gates[d] = view<const float*>(gates[d], static_cast<int64_t>(GH), 0);
    }
    if (o.has('d')) {
      operand = Array(o.dtype, states);
      for (size_t i = 0; i < states; ++i) operand.set(i, h[i] * v.dropout[i]);
      f.operand = operand.data();
    }
    f.gates_h = floats(gates_h, 0);
    f.h = floats(h, 0);
    if (lstm) f.c = floats(c, 0);
    f.h_n = h_n.data(), f.c_n = c_n.data();
    f.y = view<void*>(y, o.D * o.H, gap);
    f.saved = floats(saved, 0);
    const auto multiply = [&](int d) {
      if (const int error = Memory::from_gpu()) return error;
      const Array& with = o.has('d') ? operand : h_n;
      for (int b = 0; b < o.B; ++b) {
        for (size_t i = 0; i < GH; ++i) {
          double sum = 0;
          for (int k = 0; k < o.H; ++k) {
            sum += w_hh[(d * GH + i) * o.H + k] * with[(static_cast<size_t>(d) * o.B + b) * o.H + k];
          }
          gates_h.set(b * GH + i, sum);
        }
      }
      Memory::to_gpu();
      return 0;
    };
    run_kernels([&] { return run_variant_forward(f, o.dtype, multiply, nullptr); });
  }

  void backward() {
    const int64_t values = int64_t{variant_grads(o.cell)} * o.H;
    const Array dy = p.dy.empty() ? Array() : to_rows(p.dy, 0, o.dtype, static_cast<size_t>(o.D) * o.H, gap);
    Array hidden(o.dtype, states * G), product(DType::f32, static_cast<size_t>(o.B) * o.H);
    Array dh(DType::f32, or_zeros(p.dh_n)), dc(DType::f32, or_zeros(p.dc_n)), grads[2], inputs[2], hiddens[2];
    dh0 = Array(o.dtype, states);
    if (lstm) dc0 = Array(o.dtype, states);
    const bool one_side = lstm && !v.normalised;
    VariantBackwardSteps q{};
    q.layer = layer;
    q.bptt_steps = p.bptt_steps;
    q.saved = floats(saved, 0);
    q.h0 = h0.data(), q.c0 = c0.data();
    q.dy = view<const void*>(dy, o.D * o.H, gap);
    q.hidden = hidden.data();
    q.product = floats(product, 0);
    q.dh = floats(dh, 0);
    if (lstm) q.dc = floats(dc, 0);
    q.dh0 = dh0.data(), q.dc0 = dc0.data();
    for (int d = 0; d < o.D; ++d) {
      grads[d] = Array(DType::f32, static_cast<size_t>(rows * values));
      q.grads[d] = floats(grads[d], 0);
      inputs[d] = Array(o.dtype, elements(static_cast<int64_t>(GH), gap));
      q.of_input[d] = view<void*>(inputs[d], static_cast<int64_t>(GH), gap);
      if (one_side) continue;
      hiddens[d] = Array(o.dtype, elements(static_cast<int64_t>(GH), gap));
      q.of_hidden[d] = view<void*>(hiddens[d], static_cast<int64_t>(GH), gap);
    }
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
    run_kernels([&] { return run_variant_backward(q, o.dtype, multiply, nullptr); });
    for (int d = 0; d < o.D; ++d) {
      append(&of_input, packed_or_padded(inputs[d], static_cast<int64_t>(GH), gap));
      append(&of_hidden, packed_or_padded(one_side ? inputs[d] : hiddens[d], static_cast<int64_t>(GH), gap));
      Array before(o.dtype, elements(o.H, gap));
      HiddenBefore place = variant_hidden(layer, d, q.saved, q.h0, o.dtype);
      place.to = view<void*>(before, o.H, gap);
      run_kernels([&] { return launch_hidden_before(place, o.dtype, nullptr); });
      append(&operands, packed_or_padded(before, o.H, gap));
      Array partial(DType::f32, static_cast<size_t>(variant_segments(rows) * kVariantSums * values));
      Array results[6];
      for (int k = 0; k < 6; ++k) results[k] = Array(k < 2 ? o.dtype : DType::f32, k < 4 ? GH : o.H);
      const VariantSums all{o.cell,
                            o.T,
                            o.B,
                            o.H,
                            rows,
                            v.normalised,
                            layer.lengths,
                            q.grads[d],
                            q.saved + d * rows * record,
                            floats(partial, 0),
                            o.dtype,
                            results[0].data(),
                            results[1].data(),
                            {DType::f32, results[2].data(), results[3].data(), results[4].data(), results[5].data()}};
      run_kernels([&] { return launch_variant_sums(all, nullptr); });
      for (int k = 0; k < 6; ++k) append(&sums[k], results[k].values());
    }
  }

  static void append(Values* to, const Values& more) { to->insert(to->end(), more.begin(), more.end()); }

  size_t GH, states;
  bool lstm;
  int64_t record;
  reference::VariantProblem v{};
  VariantLayer layer{};
  Array w_hh, b_ih, b_hh, g_ih, g_hh, g_c, c_bias, dropout, h0, c0, y, h_n, c_n, saved, dh0, dc0;
  Numbers<uint8_t> mask_c, mask_h;
  Numbers<int64_t> lengths_of_kernels;
  Numbers<int> offsets;
  Values of_input, of_hidden, operands, sums[6];
};

}  // namespace

bool run_variant(const Options& options) { return VariantTest(options).run(); }

}  // namespace dlk
