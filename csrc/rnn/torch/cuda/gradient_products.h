// The gradients that a backward returns, torch's products after its recurrence, and what they multiply.
#pragma once

#include "rnn/torch/cuda/sequence_call.h"

namespace dlk {

// Adds dx, dh_0 and dc_0 to the results; *dh0 and *dc0 are where the kernels write, null if not wanted.
template <class Arguments>
void add_input_gradients(const Arguments& a, const SequenceCall& call, TensorList* grads, void** dh0, void** dc0) {
  const LayerShape& shape = call.shape;
  const auto add_state = [&](bool wanted) {
    grads->push_back(wanted ? call.on.empty({shape.D, shape.B, shape.H}, call.dtype) : call.on.absent(call.dtype));
    return data_if(wanted, grads->back());
  };
  grads->push_back(a.need_x ? empty_like(a.x) : call.on.absent(a.x.dtype()));
  *dh0 = add_state(a.need_state);
  *dc0 = add_state(a.need_state && call.lstm());
}

template <class Arguments>
void add_weight_gradients(const Arguments& a, const TensorList& weights, const SequenceCall& call, TensorList* grads) {
  for (const Tensor& w : weights) grads->push_back(a.need_weights ? empty_like(w) : call.on.absent(w.dtype()));
}

// The gradients with the dtypes in which the operator returns them.
template <class Arguments>
TensorList returned_gradients(const Arguments& a, TensorList grads) {
  grads[1] = returned_as(std::move(grads[1]), (a.h0 ? a.h0 : a.x).dtype());
  grads[2] = returned_as(std::move(grads[2]), (a.c0 ? a.c0 : a.x).dtype());
  return grads;
}

// Those of a batch without sequences.
template <class Arguments>
TensorList zero_gradients(const Arguments& a, TensorList grads) {
  for (const Tensor& grad : grads) zero(grad);
  return returned_gradients(a, std::move(grads));
}

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
