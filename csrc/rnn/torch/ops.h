// The recurrent operators on the CPU: check, allocate, fill the structs of rnn_params.h,
// call the kernel. Arguments and results are those of the schemas in ops.cpp.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "rnn/params.h"
#include "torch/tensor.h"

namespace dlk {

using SequenceOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, h_n, c_n, saved
using TensorList = std::vector<Tensor>;

// What autocast asks of a call, as numbers of DType; -1 stands for the dtype of x. With a product dtype the tensors may
// be of any dtypes but float64, and products may be rounded to it; without, all are of one.
struct CallTypes {
  int64_t product = -1, h = -1, c = -1;  // of y and h_n, of c_n
};

SequenceOutputs sequence_forward(CellKind cell, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                 const TensorList& weights, const OptionalTensor& packed,
                                 const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool bidirectional,
                                 bool batch_first, bool save, bool deterministic, const CallTypes& types);

TensorList sequence_backward(CellKind cell, const OptionalTensor& dy, const OptionalTensor& dh_n,
                             const OptionalTensor& dc_n, const Tensor& x, const OptionalTensor& h0,
                             const OptionalTensor& c0, const TensorList& weights, const Tensor& saved,
                             const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool bidirectional,
                             bool batch_first, int64_t bptt_steps, bool deterministic, bool need_x, bool need_state,
                             bool need_weights, bool gate_grads, const CallTypes& types);

TensorList cell_forward(CellKind cell, const Tensor& x, const OptionalTensor& h, const OptionalTensor& c,
                        const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                        bool save, bool deterministic, const CallTypes& types);

TensorList cell_backward(CellKind cell, const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& x,
                         const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih, const Tensor& w_hh,
                         const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& saved,
                         bool deterministic, bool need_x, bool need_state, bool need_weights, bool gate_grads,
                         const CallTypes& types);

Tensor pack_weights(const std::string& mode, const TensorList& weights, bool bidirectional);

// The shape of this thread's last call that reached a kernel, or null.
const LayerShape* last_shape();

const char* mode_name(CellKind cell);  // "lstm", "gru", "rnn_tanh", "rnn_relu"
CellKind cell_from_mode(const std::string& mode);

}  // namespace dlk
