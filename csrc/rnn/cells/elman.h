// Elman RNN cell step, forward and backward (Elman 1990), with tanh or relu:
//   h' = act(x + h)
// x carries both biases. Saved for the backward: h'.
#pragma once

#include "rnn/cells/region.h"

DLK_CELLS_BEGIN

template <bool kRelu>
struct ElmanCell : CellConstants<kRelu ? CellKind::rnn_relu : CellKind::rnn_tanh> {
  template <class V>
  static DLK_INLINE V forward(const V* x, const V* h, V, V* saved) {
    const V pre = x[0] + h[0];
    if constexpr (kRelu) {
      saved[0] = relu(pre);
    } else {
      saved[0] = tanh(pre);
    }
    return saved[0];
  }

  // h' of a saved record; at(slot) reads one of its slots.
  template <class At>
  static DLK_INLINE auto hidden(At at) {
    return at(0);
  }

  // The gradient of relu is 0 where h' <= 0. Where h' is NaN it passes unchanged, as in torch.
  template <class V>
  static DLK_INLINE V backward(V h_new, V dh) {
    if constexpr (kRelu) {
      return select_le(h_new, V::zero(), V::zero(), dh);
    } else {
      return dh * fnma(h_new, h_new, V::set1(1));
    }
  }
};

DLK_CELLS_END
