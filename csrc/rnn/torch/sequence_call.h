// Reads and checks the arguments of a layer's operators on the CPU.
#pragma once

#include "rnn/torch/boundary.h"
#include "rnn/torch/checks.h"

namespace dlk::on_cpu {

// The arguments that forward and backward have in common, checked.
struct Sequence {
  LayerShape shape{};
  DirectionWeights weights[2]{};
  std::vector<int64_t> batch_sizes, lengths;  // the call's own copies, empty if not given
  std::vector<uint8_t> resets;
  Dtypes dtypes;
  int t_dim = 0, b_dim = 1;
  Inputs inputs;

  bool is_packed() const { return !batch_sizes.empty(); }

  // A new [T, B, features], [B, T, features] or [rows, features], as x; time comes first in memory, as in torch.
  Tensor empty_rows(int64_t features, DType dtype) const {
    if (is_packed()) return empty({shape.rows, features}, torch_dtype(dtype));
    if (b_dim == 1) return empty({shape.T, shape.B, features}, torch_dtype(dtype));
    const int64_t sizes[] = {shape.B, shape.T, features}, strides[] = {features, shape.B * features, 1};
    return empty_strided(sizes, strides, 3, torch_dtype(dtype));
  }

  // A new tensor with a `record` for each direction and row, time-major even if x is not; absent if not wanted.
  Tensor empty_records(bool wanted, std::initializer_list<int64_t> record) const {
    const int32_t type = torch_dtype(compute_type(shape.dtype));
    if (!wanted) return absent(type);
    int64_t sizes[5] = {shape.D};
    int64_t dim = 1;
    if (is_packed()) {
      sizes[dim++] = shape.rows;
    } else {
      sizes[dim++] = shape.T;
      sizes[dim++] = shape.B;
    }
    for (int64_t size : record) sizes[dim++] = size;
    return empty(sizes, dim, type, cpu_device(), "what the backward needs");
  }

  RowTensor<const void*> rows(const Tensor& tensor) {
    return inputs.rows(tensor, t_dim, is_packed() ? -1 : b_dim, dtypes.of(tensor));
  }

  RowTensor<void*> output_rows(const Tensor& tensor) const {
    const int64_t* strides = tensor.strides();
    return {tensor.data(), strides[t_dim], is_packed() ? 0 : strides[b_dim], dtypes.of(tensor)};
  }
};

inline void take_weights(const TensorList& weights, Sequence* call) {
  const size_t count = weights.size() / static_cast<size_t>(call->shape.D);
  const bool bias = count >= 4, projected = count % 2 == 1;
  for (int d = 0; d < call->shape.D; ++d) {
    const Tensor* w = &weights[static_cast<size_t>(d) * count];
    DirectionWeights& into = call->weights[d];
    into.dtype = call->dtypes.of(w[0]);
    into.w_ih = call->inputs.contiguous(w[0]);
    into.w_hh = call->inputs.contiguous(w[1]);
    if (bias) {
      into.b_ih = call->inputs.contiguous(w[2]);
      into.b_hh = call->inputs.contiguous(w[3]);
    }
    if (projected) into.w_hr = call->inputs.contiguous(w[count - 1]);
  }
}

template <class Arguments>
void read_call(CellKind cell, const Arguments& a, Sequence* call) {
  LayerShape& shape = call->shape;
  shape.cell = cell;
  call->dtypes = Dtypes(check_float(a.x, "x"), a.product_dtype);
  shape.dtype = call->dtypes.product();
  shape.narrow = has_narrow_slots(shape.dtype);
  call->batch_sizes = read_sequence(a, call->dtypes, nullptr, &shape);
  if (!a.batch_sizes && a.batch_first) std::swap(call->t_dim, call->b_dim);
  if (a.lengths) call->lengths = read_lengths(a.lengths, shape.T);
  call->resets = read_resets(resets_of(a, 0));
}

inline StateTensor<const void*> take_state(const OptionalTensor& state, Sequence* call) {
  if (!state) return {};
  return {call->inputs.contiguous(state), call->dtypes.of(state)};
}

// A new state tensor, absent if not wanted.
inline Tensor new_state(bool wanted, int64_t size, DType dtype, const Sequence& call, StateTensor<void*>* into) {
  Output out = output(wanted, {call.shape.D, call.shape.B, size}, torch_dtype(dtype));
  *into = {out.data, dtype};
  return std::move(out.tensor);
}

template <class T>
const T* values_or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

// Fills in what the forward and the backward of a layer read alike.
template <class Arguments, class Params>
void take_inputs(const Arguments& a, Sequence* call, Params* params) {
  params->shape = call->shape;
  params->x = call->rows(a.x);
  params->h0 = take_state(a.h0, call);
  params->c0 = take_state(a.c0, call);
  take_weights(a.weights, call);
  params->weights[0] = call->weights[0];
  params->weights[1] = call->weights[1];
  params->batch_sizes = values_or_null(call->batch_sizes);
  params->lengths = values_or_null(call->lengths);
  params->resets = values_or_null(call->resets);
}

// Fills in what the backward reads besides.
template <class Arguments>
void take_cotangents(const Arguments& a, Sequence* call, BackwardParams* params) {
  params->saved = call->inputs.contiguous(a.saved);
  if (a.dy) params->dy = call->rows(a.dy);
  if (const OptionalTensor& dcells = dcells_of(a, 0)) params->dcells = call->rows(dcells);
  params->dh_n = take_state(a.dh_n, call);
  params->dc_n = take_state(a.dc_n, call);
  params->bptt_steps = a.bptt_steps;
}

// Makes the first results of the backward, the gradients of x, h0 and c0.
template <class Arguments>
void add_input_gradients(const Arguments& a, const Sequence& call, BackwardParams* params, TensorList* grads) {
  const LayerShape& shape = call.shape;
  grads->push_back(a.need_x ? empty_like(a.x) : absent(a.x.dtype()));
  if (a.need_x) params->dx = call.output_rows(grads->back());
  const DType of_x = call.dtypes.of(a.x);
  const bool of_c = a.need_state && cell_traits(shape.cell).cell_state;
  grads->push_back(new_state(a.need_state, shape.outputs(), a.h0 ? params->h0.dtype : of_x, call, &params->dh0));
  grads->push_back(new_state(of_c, shape.H, a.c0 ? params->c0.dtype : of_x, call, &params->dc0));
}

// Where the kernels write the gradients of the weights of each direction; `grads` has them from number 3 on.
inline void take_weight_gradients(const TensorList& grads, size_t weights, int directions, BackwardParams* params) {
  const size_t count = weights / static_cast<size_t>(directions);
  for (int d = 0; d < directions; ++d) {
    const Tensor* w = &grads[3 + static_cast<size_t>(d) * count];
    const bool bias = count >= 4, projected = count % 2 == 1;
    params->grads[d] = {w[0].data(), w[1].data(), bias ? w[2].data() : nullptr, bias ? w[3].data() : nullptr,
                        projected ? w[count - 1].data() : nullptr};
  }
}

}  // namespace dlk::on_cpu
