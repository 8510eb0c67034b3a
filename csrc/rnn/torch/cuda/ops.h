// The recurrent operators on CUDA tensors; arguments and results are those of the schemas in ops.cpp, less those that
// mean nothing here (prepacked weights, and determinism, which is always kept).
#pragma once

#include "rnn/torch/ops.h"
#include "call.h"

namespace dlk {

SequenceOutputs gpu_sequence_forward(CellKind cell, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                     const TensorList& weights, const OptionalTensor& batch_sizes,
                                     const OptionalTensor& lengths, bool bidirectional, bool batch_first, bool save,
                                     const CallTypes& types);

TensorList gpu_sequence_backward(CellKind cell, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                 const OptionalTensor& dc_n, const Tensor& x, const OptionalTensor& h0,
                                 const OptionalTensor& c0, const TensorList& weights, const Tensor& saved,
                                 const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool bidirectional,
                                 bool batch_first, int64_t bptt_steps, bool need_x, bool need_state, bool need_weights,
                                 bool gate_grads, const CallTypes& types);

TensorList gpu_cell_forward(CellKind cell, const Tensor& x, const OptionalTensor& h, const OptionalTensor& c,
                            const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                            const OptionalTensor& b_hh, bool save, const CallTypes& types);

TensorList gpu_cell_backward(CellKind cell, const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& x,
                             const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih, const Tensor& w_hh,
                             const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& saved, bool need_x,
                             bool need_state, bool need_weights, bool gate_grads, const CallTypes& types);

}  // namespace dlk
