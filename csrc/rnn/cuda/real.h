// The vector type of csrc/rnn/cells on the GPU: one float. The equations are included here, once for all kernels.
#pragma once

#include <cmath>
#include <type_traits>

#include "device.h"

#define DLK_INLINE DLK_DEVICE

namespace dlk {
namespace gpu {

struct Real {
  float v;
  static DLK_DEVICE Real zero() { return {0.0f}; }
  static DLK_DEVICE Real set1(float x) { return {x}; }
};

DLK_DEVICE Real operator+(Real a, Real b) { return {a.v + b.v}; }
DLK_DEVICE Real operator-(Real a, Real b) { return {a.v - b.v}; }
DLK_DEVICE Real operator*(Real a, Real b) { return {a.v * b.v}; }
DLK_DEVICE Real fma(Real a, Real b, Real c) { return {fmaf(a.v, b.v, c.v)}; }
DLK_DEVICE Real fnma(Real a, Real b, Real c) { return {fmaf(-a.v, b.v, c.v)}; }
DLK_DEVICE Real select_le(Real a, Real b, Real x, Real y) { return {a.v <= b.v ? x.v : y.v}; }
DLK_DEVICE Real sigmoid(Real a) { return {1.0f / (1.0f + expf(-a.v))}; }
DLK_DEVICE Real tanh(Real a) { return {tanhf(a.v)}; }
// NaN stays NaN.
DLK_DEVICE Real relu(Real a) { return {a.v < 0.0f ? 0.0f : a.v}; }

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
  static DLK_DEVICE Real forward(bool use_relu, const Real* x, const Real* h, Real* saved) {
    return use_relu ? ElmanCell<true>::forward(x, h, Real{}, saved) : ElmanCell<false>::forward(x, h, Real{}, saved);
  }
  static DLK_DEVICE Real backward(bool use_relu, Real h_new, Real dh) {
    return use_relu ? ElmanCell<true>::backward(h_new, dh) : ElmanCell<false>::backward(h_new, dh);
  }
};

template <class Cell>
constexpr bool kIsRnn = std::is_same_v<Cell, RnnCell>;

// One cell's step forward. x: input products with biases, hidden: recurrent products (gru's n with its bias),
// state: c for the lstm, h for the gru. Returns h'; the last slot of `saved` is the state after the step.
template <class Cell>
DLK_DEVICE float step_forward(bool use_relu, const float* x, const float* hidden, float state, float* saved) {
  Real xs[Cell::kGates], hs[Cell::kGates], out[Cell::kSaved], h;
  DLK_UNROLL
  for (int g = 0; g < Cell::kGates; ++g) xs[g] = {x[g]}, hs[g] = {hidden[g]};
  if constexpr (kIsRnn<Cell>) {
    h = Cell::forward(use_relu, xs, hs, out);
  } else {
    h = Cell::forward(xs, hs, Real{state}, out);
  }
  DLK_UNROLL
  for (int s = 0; s < Cell::kSaved; ++s) saved[s] = out[s].v;
  return h.v;
}

// One cell's step backward. Writes the gate gradients in the order of gate_grads, and returns the part of dh that
// reaches h directly, not through the gates. state: the c (lstm) or h (gru) before the step; the rnn needs none.
// *dc: the gradient of c' on entry, that of c on return.
template <class Cell>
DLK_DEVICE float step_backward(bool use_relu, const float* saved, float state, float dh, float* dc, float* dgates) {
  if constexpr (kIsRnn<Cell>) {
    dgates[0] = Cell::backward(use_relu, Real{saved[0]}, Real{dh}).v;
    return 0.0f;
  } else {
    Real in[Cell::kSaved], out[Cell::kGateGrads];
    DLK_UNROLL
    for (int s = 0; s < Cell::kSaved; ++s) in[s] = {saved[s]};
    float direct = 0.0f;
    if constexpr (Cell::kCellState) {
      Real dc_real{*dc};
      Cell::backward(in, Real{state}, Real{dh}, &dc_real, out);
      *dc = dc_real.v;
    } else {
      direct = Cell::backward(in, Real{state}, Real{dh}, out).v;
    }
    DLK_UNROLL
    for (int g = 0; g < Cell::kGateGrads; ++g) dgates[g] = out[g].v;
    return direct;
  }
}

// h' of a saved float32 record; `distance` is the number of floats from slot to slot.
template <class Cell>
DLK_DEVICE float hidden_of(const float* record, int64_t distance) {
  return Cell::hidden([&](int slot) { return Real{record[slot * distance]}; }).v;
}

// The slot of a gate's gradient on the hidden side. For the gru's n it is the fourth, because the third is that of its
// input half.
template <class Cell>
DLK_DEVICE constexpr int hidden_slot(int gate) {
  return gate == Cell::kPartedGate ? Cell::kGates : gate;
}

}  // namespace gpu
}  // namespace dlk
