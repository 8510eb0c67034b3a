// The arguments of the operators of layers with layer normalisation, zoneout and recurrent dropout: their checks, the
// same on every device.
#pragma once

#include "rnn/torch/checks.h"
#include "rnn/variants.h"

namespace dlk {

// The gains of one direction.
struct GainList {
  size_t count;  // 0 without layer normalisation
  bool of_c, bias;
};

inline GainList gain_list(const LayerShape& shape, const TensorList& weights, const TensorList& gains) {
  const bool of_c = cell_traits(shape.cell).cell_state;
  const bool bias = of_c && weights.size() / static_cast<size_t>(shape.D) == 4;
  return {gains.empty() ? 0 : size_t{2} + of_c + bias, of_c, bias};
}

// The gains of one direction, from the first of their tensors on; pointer_of() gives the pointer to a tensor's data.
template <class Pointer, class PointerOf>
Gains<Pointer> gains_at(const GainList& list, DType dtype, const Tensor* g, const PointerOf& pointer_of) {
  if (list.count == 0) return {};
  return {dtype, pointer_of(g[0]), pointer_of(g[1]), list.of_c ? pointer_of(g[2]) : nullptr,
          list.bias ? pointer_of(g[3]) : nullptr};
}

// Checks what read_sequence() does not; `device` is null for the CPU.
template <class Arguments>
void check_variant(const Arguments& a, const Dtypes& dtypes, const Device* device, const LayerShape& shape) {
  DLK_CHECK(shape.P == 0, "weights: a layer with layer normalisation, zoneout or recurrent dropout has no projection");
  const int64_t gates = gate_count(shape.cell) * shape.H;
  const GainList list = gain_list(shape, a.weights, a.gains);
  const size_t expected = list.count * static_cast<size_t>(shape.D);
  DLK_CHECK(a.gains.size() == expected, "gains must hold norm_ih, norm_hh", list.of_c ? ", norm_c" : "",
            list.bias ? ", bias_c" : "", " for each of ", shape.D, " directions, or nothing, got ", a.gains.size(),
            " tensors");
  // The number of a gain, 0 to 7, is set in these names, so that a call makes no strings.
  char names[][20] = {"gains[0] (norm_ih)", "gains[0] (norm_hh)", "gains[0] (norm_c)", "gains[0] (bias_c)"};
  for (size_t k = 0; k < a.gains.size(); ++k) {
    const size_t which = k % list.count;
    names[which][6] = static_cast<char>('0' + k);
    check_tensor(a.gains[k], names[which], torch_dtype(dtypes.of(a.gains[0])), {which < 2 ? gates : shape.H}, device);
  }
  if (a.dropout)
    check_tensor(a.dropout, "dropout", torch_dtype(compute_type(shape.dtype)), {shape.D, shape.B, shape.H}, device);
  const auto check_mask = [&](const OptionalTensor& mask, const char* what) {
    if (!mask) return;
    if (a.batch_sizes) {
      check_tensor(mask, what, aoti_torch_dtype_bool(), {shape.D, shape.rows, shape.H}, device);
    } else {
      check_tensor(mask, what, aoti_torch_dtype_bool(), {shape.D, shape.T, shape.B, shape.H}, device);
    }
  };
  check_cell_state(shape.cell, a.mask_c, "mask_c");
  check_mask(a.mask_c, "mask_c");
  check_mask(a.mask_h, "mask_h");
  DLK_CHECK_VALUE(a.eps >= 0, "eps must not be negative, got ", a.eps);
  const auto check_rate = [](double rate, const char* what) {
    DLK_CHECK_VALUE(rate >= 0 && rate <= 1, what, " must lie in 0..1, got ", rate);
  };
  check_rate(a.zoneout_c, "zoneout_c");
  check_rate(a.zoneout_h, "zoneout_h");
  DLK_CHECK_VALUE(list.of_c || a.zoneout_c == 0, "zoneout_c must be 0 for a gru, which has no cell state, got ",
                  a.zoneout_c);
}

}  // namespace dlk
