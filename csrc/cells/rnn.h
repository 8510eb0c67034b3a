// Elman RNN cell step, forward and backward (Elman 1990), with tanh or relu:
//   h' = act(x + h)
// x carries both biases. Nothing is saved but h'. No include guard: see docs/architecture.md.

template <bool kRelu>
struct ElmanCell {
  static constexpr int kGates = 1, kSaved = 0, kGateGrads = 1;
  static constexpr bool kHiddenBias = false;
  static constexpr bool kCellState = false, kDirectPath = false;

  template <class V>
  static DLK_INLINE V forward(const V* x, const V* h, V, V*) {
    const V pre = x[0] + h[0];
    if constexpr (kRelu) {
      return relu(pre);
    } else {
      return tanh(pre);
    }
  }

  template <class V>
  static DLK_INLINE V backward(V h_new, V dh) {
    if constexpr (kRelu) {
      return select_gt(h_new, V::zero(), dh, V::zero());
    } else {
      return dh * fnma(h_new, h_new, V::set1(1));
    }
  }
};
