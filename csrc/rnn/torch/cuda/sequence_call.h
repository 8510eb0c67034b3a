// The arguments that the sequence operators on CUDA tensors have in common: their checks, and the forms that kernels
// and products read.
#pragma once

#include "rnn/cuda/rows.h"
#include "rnn/torch/cuda/call.h"

namespace dlk {

struct GpuWeights {
  Tensor w_ih, w_hh, b_ih, b_hh;  // contiguous; the biases may be absent
  bool bias = false;
};

struct SequenceCall : Call {
  using Call::Call;

  bool is_packed() const { return !batch_sizes.empty(); }
  const int64_t* host_sizes() const { return is_packed() ? batch_sizes.data() : nullptr; }

  // Describes a matrix whose rows are in the order of those of `x`: for padded input time-major if by_time, else
  // sequence-major; for packed input the order of its data.
  template <class Pointer>
  RowTensor<Pointer> rows(Pointer data, int64_t features, DType of) const {
    if (is_packed()) return {data, features, 0, of};
    return by_time ? RowTensor<Pointer>{data, shape.B * features, features, of}
                   : RowTensor<Pointer>{data, features, shape.T * features, of};
  }
  // Describes a tensor with the dimensions of x, by its strides.
  template <class Pointer>
  RowTensor<Pointer> strided_rows(const Tensor& tensor) const {
    const int64_t* strides = tensor.strides();
    if (is_packed()) return {tensor.data(), strides[0], 0, shape.dtype};
    return {tensor.data(), strides[batch_first ? 1 : 0], strides[batch_first ? 0 : 1], shape.dtype};
  }
  // The flags of resets that the kernels read, null if there are none.
  const uint8_t* flags() const { return has_resets ? static_cast<const uint8_t*>(resets.data()) : nullptr; }
  // A new tensor with the dimensions of x; time comes first in memory, as in torch.
  Tensor empty_rows(int64_t features) const {
    if (is_packed()) return on.empty({shape.rows, features}, dtype);
    if (!batch_first) return on.empty({shape.T, shape.B, features}, dtype);
    const int64_t sizes[] = {shape.B, shape.T, features}, strides[] = {features, shape.B * features, 1};
    return empty_strided(sizes, strides, 3, dtype, on.device());
  }
  // The tensor, copied if its dtype is not that of the kernels or its features are not contiguous.
  Tensor row_operand(const Tensor& tensor) const {
    const int64_t last = tensor.dim() - 1;
    const bool dense = tensor.strides()[last] == 1 || tensor.size(last) <= 1;
    return dense && tensor.dtype() == dtype ? another_handle(tensor) : contiguous_as(tensor, dtype);
  }
  // A new tensor for what the forward saves for the backward, `record` floats a row, time-major.
  Tensor empty_records(int64_t record) const {
    if (is_packed()) return on.floats({shape.D, shape.rows, record});
    return on.floats({shape.D, shape.T, shape.B, record});
  }
  Tensor empty_gate_grads() const {
    const int64_t slots = gate_grad_slots(shape.cell);
    if (is_packed()) return on.floats({shape.D, shape.rows, slots, shape.H});
    return on.floats({shape.D, shape.T, shape.B, slots, shape.H});
  }

  GpuWeights weights[2];
  std::vector<int64_t> batch_sizes;    // the call's own, empty for padded x
  Tensor offsets, lengths, resets, x;  // x: rows without gaps, time-major if by_time, else sequence-major
  bool has_lengths = false, has_resets = false, batch_first = false, by_time = true;
};

// Whether time comes first in the memory of batch-first x, as in the output of another layer.
inline bool lies_by_time(const Tensor& x) {
  const int64_t *sizes = x.sizes(), *strides = x.strides();
  return strides[2] == 1 && strides[0] == sizes[2] && strides[1] == sizes[0] * sizes[2];
}

template <class Arguments>
void read_call(const Arguments& a, SequenceCall* call) {
  LayerShape& shape = call->shape;
  call->batch_sizes = read_sequence(a, call->dtypes, &call->on.device(), &shape);
  call->batch_first = a.batch_first && !a.batch_sizes;
  call->has_lengths = static_cast<bool>(a.lengths);
  call->has_resets = static_cast<bool>(resets_of(a, 0));
  call->weights[0].bias = call->weights[1].bias = a.weights.size() / static_cast<size_t>(shape.D) >= 4;
  DLK_CHECK(shape.P == 0, "weights: there are no CUDA kernels for projections");
  DLK_CHECK(shape.rows < int64_t{1} << 31, "x has too many rows for the CUDA kernels: ", shape.rows);
}

// Called after the last check, so that nothing is copied for a call that is refused. `any_order`: x may keep the order
// that it has in memory.
template <class Arguments>
void take_arguments(const Arguments& a, bool any_order, SequenceCall* call) {
  const LayerShape& shape = call->shape;
  const size_t count = a.weights.size() / static_cast<size_t>(shape.D);
  for (int d = 0; d < shape.D; ++d) {
    const Tensor* w = &a.weights[static_cast<size_t>(d) * count];
    GpuWeights& into = call->weights[d];
    into.w_ih = call->operand(w[0]);
    into.w_hh = call->operand(w[1]);
    if (!into.bias) continue;
    into.b_ih = call->operand(w[2]);
    into.b_hh = call->operand(w[3]);
  }
  const bool as_it_lies = any_order && call->batch_first && a.x.dtype() == call->dtype && lies_by_time(a.x);
  call->by_time = !call->batch_first || as_it_lies;
  call->x = as_it_lies ? another_handle(a.x) : call->operand(a.x);
  // Copied, because blocks that wait for each other must see the same lengths and flags, even if the caller's tensors
  // are written to while the kernel runs.
  if (a.lengths) call->lengths = contiguous_copy(a.lengths);
  if (call->has_resets) call->resets = contiguous_copy(resets_of(a, 0));
  if (call->is_packed() && shape.B > 0) {
    call->offsets = call->on.empty({shape.T + 1}, aoti_torch_dtype_int32());
    check_launch(
        launch_offsets(call->batch_sizes.data(), shape.T, static_cast<int*>(call->offsets.data()), call->on.stream()));
  }
}

}  // namespace dlk
