// LSTM cell step, forward and backward (Hochreiter & Schmidhuber 1997, with the forget
// gate of Gers et al. 2000):
//   i, f, o = sigmoid(x_i + h_i), ...;  g = tanh(x_g + h_g)
//   c' = f * c + i * g;  h' = o * tanh(c')
// x_*, h_* are the input and hidden products; x_* carries both biases.
// Saved for the backward: i, f, g, o, c'.
#pragma once

#include "rnn/cells/region.h"

DLK_CELLS_BEGIN

struct LstmCell : CellConstants<CellKind::lstm> {
  enum Slot { kI, kF, kG, kO, kC };
  static_assert(kC == kStateSlot);

  template <class V>
  static DLK_INLINE V forward(const V* x, const V* h, V c, V* saved) {
    gates(x, h, c, saved);
    return saved[kO] * tanh(saved[kC]);
  }

  // The gates and c', without h'.
  template <class V>
  static DLK_INLINE void gates(const V* x, const V* h, V c, V* saved) {
    const V i = sigmoid(x[0] + h[0]);
    const V f = sigmoid(x[1] + h[1]);
    const V g = tanh(x[2] + h[2]);
    const V o = sigmoid(x[3] + h[3]);
    saved[kI] = i;
    saved[kF] = f;
    saved[kG] = g;
    saved[kO] = o;
    saved[kC] = state(saved, c);
  }

  // c' from the gates and the c before.
  template <class V>
  static DLK_INLINE V state(const V* saved, V c) {
    return fma(saved[kF], c, saved[kI] * saved[kG]);
  }

  // h' of a saved record, computed from o and c'; at(slot) reads one of its slots.
  template <class At>
  static DLK_INLINE auto hidden(At at) {
    return at(kO) * tanh(at(kC));
  }

  // The factors of the backward, which depend on no gradient: the GPU computes them while it waits for dh.
  // The first three are those of the gradient of c' in the gradients of i, f and g, then come those of dh
  // in the gradients of o and c', and that of the gradient of c' in the gradient of c.
  enum Factor { kFactorI, kFactorF, kFactorG, kFactorO, kFactorH, kFactorC, kFactors };

  // Returns the cell's own output o * tanh(c'), for a projection's weight gradient.
  template <class V>
  static DLK_INLINE V factors(const V* saved, V c, V* to) {
    const V one = V::set1(1);
    const V i = saved[kI], f = saved[kF], g = saved[kG], o = saved[kO];
    const V tanh_c = tanh(saved[kC]);
    to[kFactorI] = g * (i * (one - i));
    to[kFactorF] = c * (f * (one - f));
    to[kFactorG] = i * fnma(g, g, one);
    to[kFactorO] = tanh_c * (o * (one - o));
    to[kFactorH] = o * fnma(tanh_c, tanh_c, one);
    to[kFactorC] = f;
    return o * tanh_c;
  }

  // *dc is the gradient of c' on entry and that of c on return. Writes the gradients of i, f, g, o to dgates.
  template <class V>
  static DLK_INLINE void backward(const V* factors, V dh, V* dc, V* dgates) {
    const V d = fma(dh, factors[kFactorH], *dc);
    dgates[0] = d * factors[kFactorI];
    dgates[1] = d * factors[kFactorF];
    dgates[2] = d * factors[kFactorG];
    dgates[3] = dh * factors[kFactorO];
    *dc = d * factors[kFactorC];
  }
};

DLK_CELLS_END
