// Torch's products after the backward's recurrence, and what they multiply.
#pragma once

#include "rnn/torch/cuda/sequence_call.h"

namespace dlk {

// dx from the gradients of W_ih x of each direction, [rows, G*H] with rows in the order of x.
inline void input_gradient(const SequenceCall& call, const Tensor* of_input, const Tensor& dx, DType of_dx) {
  const LayerShape& shape = call.shape;
  if (shape.D == 1) {
    multiply(of_input[0], call.weights[0].w_ih, matrix(dx, shape.rows, shape.I));
    return;
  }
  Tensor parts[2];
  for (int d = 0; d < 2; ++d) {
    parts[d] = call.on.floats({shape.rows, shape.I});
    multiply(of_input[d], call.weights[d].w_ih, parts[d]);
  }
  const AddStates sum{shape.rows * shape.I, static_cast<const float*>(parts[0].data()),
                      static_cast<const float*>(parts[1].data()), dx.data()};
  check_launch(launch_add_states(sum, of_dx, call.on.stream()));
}

// The other factor of W_ih's gradient: x [rows, I], with zeros in the padding, whose values are the caller's.
inline Tensor alive_inputs(const SequenceCall& call) {
  const LayerShape& shape = call.shape;
  if (!call.has_lengths) return matrix(call.x, shape.rows, shape.I);
  Tensor masked = call.on.empty({shape.rows, shape.I}, call.dtype);
  const CopyRows rows{static_cast<int>(shape.T),
                      static_cast<int>(shape.B),
                      shape.I,
                      item_bytes(shape.dtype),
                      static_cast<const int64_t*>(call.lengths.data()),
                      call.rows(static_cast<const void*>(call.x.data()), shape.I, shape.dtype),
                      call.rows(masked.data(), shape.I, shape.dtype)};
  check_launch(launch_copy_rows(rows, call.on.stream()));
  return masked;
}

}  // namespace dlk
