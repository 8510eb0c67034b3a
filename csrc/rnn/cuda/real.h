// The vector type of csrc/rnn/cells on the GPU: one float. The equations are included here, once for all kernels.
#pragma once

#include <cmath>
#include <type_traits>

#include "device.h"

#define DLK_INLINE DLK_DEVICE

namespace dlk {
namespace gpu {

// A float in the equations of a layer of dtype S. The activations of 16-bit layers use the approximate instructions
// without branches; their error is about 2^-22, far below the rounding of what they are computed from and stored in.
template <class S>
struct Real {
  float v;
  static DLK_DEVICE Real zero() { return {0.0f}; }
  static DLK_DEVICE Real set1(float x) { return {x}; }
};

template <class S>
DLK_DEVICE Real<S> operator+(Real<S> a, Real<S> b) {
  return {a.v + b.v};
}
template <class S>
DLK_DEVICE Real<S> operator-(Real<S> a, Real<S> b) {
  return {a.v - b.v};
}
template <class S>
DLK_DEVICE Real<S> operator*(Real<S> a, Real<S> b) {
  return {a.v * b.v};
}
template <class S>
DLK_DEVICE Real<S> fma(Real<S> a, Real<S> b, Real<S> c) {
  return {fmaf(a.v, b.v, c.v)};
}
template <class S>
DLK_DEVICE Real<S> fnma(Real<S> a, Real<S> b, Real<S> c) {
  return {fmaf(-a.v, b.v, c.v)};
}
template <class S>
DLK_DEVICE Real<S> select_le(Real<S> a, Real<S> b, Real<S> x, Real<S> y) {
  return {a.v <= b.v ? x.v : y.v};
}
template <class S>
DLK_DEVICE Real<S> sigmoid(Real<S> a) {
  if constexpr (sizeof(S) == 4) {
    return {1.0f / (1.0f + expf(-a.v))};
  } else {
    constexpr float kLog2E = 1.44269504f;
    return {reciprocal_approximate(1.0f + exp2_approximate(-kLog2E * a.v))};
  }
}
template <class S>
DLK_DEVICE Real<S> tanh(Real<S> a) {
  if constexpr (sizeof(S) == 4) {
    return {tanhf(a.v)};
  } else {
    // 1 - 2 / (1 + exp(2a)). It cancels near 0, where two terms of the series are exact to 2^-18 of the result.
    constexpr float kTwiceLog2E = 2.88539008f, kSmall = 0.0625f;
    const float far = fmaf(-2.0f, reciprocal_approximate(1.0f + exp2_approximate(kTwiceLog2E * a.v)), 1.0f);
    const float near = fmaf(a.v * a.v * (-1.0f / 3.0f), a.v, a.v);
    return {fabsf(a.v) < kSmall ? near : far};
  }
}
// NaN stays NaN.
template <class S>
DLK_DEVICE Real<S> relu(Real<S> a) {
  return {a.v < 0.0f ? 0.0f : a.v};
}

}  // namespace gpu
}  // namespace dlk

#define DLK_CELLS_BEGIN \
  namespace dlk {       \
  namespace gpu {
#define DLK_CELLS_END \
  }                   \
  }
#include "rnn/cells/elman.h"
#include "rnn/cells/gru.h"
#include "rnn/cells/lstm.h"

namespace dlk {
namespace gpu {

// Chooses tanh or relu by a flag of the call, so that one kernel serves both.
struct RnnCell : ElmanCell<false> {
  template <class V>
  static DLK_DEVICE V forward(bool use_relu, const V* x, const V* h, V* saved) {
    return use_relu ? ElmanCell<true>::forward(x, h, V{}, saved) : ElmanCell<false>::forward(x, h, V{}, saved);
  }
  template <class V>
  static DLK_DEVICE V backward(bool use_relu, V h_new, V dh) {
    return use_relu ? ElmanCell<true>::backward(h_new, dh) : ElmanCell<false>::backward(h_new, dh);
  }
};

template <class Cell>
constexpr bool kIsRnn = std::is_same_v<Cell, RnnCell>;

// One cell's step forward. x: input products with biases, hidden: recurrent products (gru's n with its bias),
// state: c for the lstm, h for the gru. Returns h'; the last slot of `saved` is the state after the step.
template <class Cell, class S>
DLK_DEVICE float step_forward(bool use_relu, const float* x, const float* hidden, float state, float* saved) {
  using V = Real<S>;
  V xs[Cell::kGates], hs[Cell::kGates], out[Cell::kSaved], h;
  DLK_UNROLL
  for (int g = 0; g < Cell::kGates; ++g) xs[g] = {x[g]}, hs[g] = {hidden[g]};
  if constexpr (kIsRnn<Cell>) {
    h = Cell::forward(use_relu, xs, hs, out);
  } else {
    h = Cell::forward(xs, hs, V{state}, out);
  }
  DLK_UNROLL
  for (int s = 0; s < Cell::kSaved; ++s) saved[s] = out[s].v;
  return h.v;
}

// What a cell's step backward needs beside gradients: the lstm's factors, of the others the record and the h before the
// step.
template <class Cell, class S>
struct BackwardInputs {
  float record[Cell::kSaved], state;
};
template <class S>
struct BackwardInputs<LstmCell, S> {
  float factors[LstmCell::kFactors];
};

// state: the c (lstm) or h (gru) before the step; the rnn needs none.
template <class Cell, class S>
DLK_DEVICE BackwardInputs<Cell, S> backward_inputs(const float* saved, float state) {
  BackwardInputs<Cell, S> inputs;
  if constexpr (Cell::kCellState) {
    Real<S> in[Cell::kSaved], out[Cell::kFactors];
    DLK_UNROLL
    for (int s = 0; s < Cell::kSaved; ++s) in[s] = {saved[s]};
    Cell::factors(in, Real<S>{state}, out);
    DLK_UNROLL
    for (int f = 0; f < Cell::kFactors; ++f) inputs.factors[f] = keep_in_register(out[f].v);
  } else {
    DLK_UNROLL
    for (int s = 0; s < Cell::kSaved; ++s) inputs.record[s] = saved[s];
    inputs.state = state;
  }
  return inputs;
}

// One cell's step backward. Writes the gate gradients in the order of gate_grads, and returns the part of dh that
// reaches h directly, not through the gates. *dc: the gradient of c' on entry, that of c on return.
template <class Cell, class S>
DLK_DEVICE float step_backward(bool use_relu, const BackwardInputs<Cell, S>& inputs, float dh, float* dc,
                               float* dgates) {
  using V = Real<S>;
  V out[Cell::kGateGrads];
  float direct = 0.0f;
  if constexpr (Cell::kCellState) {
    V factors[Cell::kFactors], dc_real{*dc};
    DLK_UNROLL
    for (int f = 0; f < Cell::kFactors; ++f) factors[f] = {inputs.factors[f]};
    Cell::backward(factors, V{dh}, &dc_real, out);
    *dc = dc_real.v;
  } else if constexpr (kIsRnn<Cell>) {
    out[0] = Cell::backward(use_relu, V{inputs.record[0]}, V{dh});
  } else {
    V in[Cell::kSaved];
    DLK_UNROLL
    for (int s = 0; s < Cell::kSaved; ++s) in[s] = {inputs.record[s]};
    direct = Cell::backward(in, V{inputs.state}, V{dh}, out).v;
  }
  DLK_UNROLL
  for (int g = 0; g < Cell::kGateGrads; ++g) dgates[g] = out[g].v;
  return direct;
}

// h' of a saved float32 record; `distance` is the number of floats from slot to slot.
template <class Cell, class S>
DLK_DEVICE float hidden_of(const float* record, int64_t distance) {
  return Cell::hidden([&](int slot) { return Real<S>{record[slot * distance]}; }).v;
}

// The slot of a gate's gradient on the hidden side. For the gru's n it is the fourth, because the third is that of its
// input half.
template <class Cell>
DLK_DEVICE constexpr int hidden_slot(int gate) {
  return gate == Cell::kPartedGate ? Cell::kGates : gate;
}
// The inverse: the gate of which a slot is the gradient on the hidden side, or kNone.
template <class Cell>
DLK_DEVICE constexpr int hidden_gate_of(int slot) {
  if (Cell::kHasPartedGate && slot == Cell::kGates) return Cell::kPartedGate;
  return slot < Cell::kGates && slot != Cell::kPartedGate ? slot : kNone;
}

}  // namespace gpu
}  // namespace dlk
