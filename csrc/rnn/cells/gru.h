// GRU cell step, forward and backward (Cho et al. 2014, in the form of cuDNN and
// torch.nn.GRU: the reset gate acts on the hidden product, after its bias):
//   r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z);  n = tanh(x_n + r * h_n)
//   h' = n + z * (h - n)
// x_* carries b_ih, and b_hh too for r and z; h_n carries its own b_hh.
// Saved for the backward: r, z, n, h_n, h'.
#pragma once

#include "rnn/cells/region.h"

DLK_CELLS_BEGIN

struct GruCell : CellConstants<CellKind::gru> {
  enum Slot { kR, kZ, kN, kHiddenN, kH };
  static_assert(kH == kStateSlot && kN == kPartedGate);

  template <class V>
  static DLK_INLINE V forward(const V* x, const V* hidden, V h, V* saved) {
    const V r = sigmoid(x[0] + hidden[0]);
    const V z = sigmoid(x[1] + hidden[1]);
    const V n = tanh(fma(r, hidden[2], x[2]));
    saved[kR] = r;
    saved[kZ] = z;
    saved[kN] = n;
    saved[kHiddenN] = hidden[2];
    saved[kH] = fma(z, h - n, n);
    return saved[kH];
  }

  // h' of a saved record; at(slot) reads one of its slots.
  template <class At>
  static DLK_INLINE auto hidden(At at) {
    return at(kH);
  }

  // dgates: gradients of r, z and n on the input side, then of n on the hidden side.
  // Returns the part of dh that reaches h directly, not through the gates.
  template <class V>
  static DLK_INLINE V backward(const V* saved, V h, V dh, V* dgates) {
    const V one = V::set1(1);
    const V r = saved[kR], z = saved[kZ], n = saved[kN], h_n = saved[kHiddenN];
    const V dn = dh * (one - z) * fnma(n, n, one);
    dgates[0] = dn * h_n * (r * (one - r));
    dgates[1] = dh * (h - n) * (z * (one - z));
    dgates[2] = dn;
    dgates[3] = dn * r;
    return dh * z;
  }
};

DLK_CELLS_END
