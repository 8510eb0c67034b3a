// The recurrent operators: they check, allocate, fill the structs of rnn/params.h and call the kernels. Both devices
// take the same arguments; prepacked weights are for the CPU only, and results on CUDA are always deterministic.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "rnn/torch/arguments.h"

namespace dlk {

using SequenceOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // y, h_n, c_n, saved, cells
using VariantOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;           // y, h_n, c_n, saved

#define DLK_RECURRENT_OPERATORS                                                       \
  SequenceOutputs sequence_forward(CellKind cell, const SequenceForwardArguments& a); \
  TensorList sequence_backward(CellKind cell, const SequenceBackwardArguments& a);    \
  TensorList cell_forward(CellKind cell, const CellForwardArguments& a);              \
  TensorList cell_backward(CellKind cell, const CellBackwardArguments& a);            \
  VariantOutputs variant_forward(CellKind cell, const VariantForwardArguments& a);    \
  TensorList variant_backward(CellKind cell, const VariantBackwardArguments& a);
namespace on_cpu {
DLK_RECURRENT_OPERATORS
// sequence_forward without the tensors of shape [0] that stand for results that are not there; those are null.
SequenceOutputs sequence_results(CellKind cell, const SequenceForwardArguments& a);
}  // namespace on_cpu
namespace on_cuda {
DLK_RECURRENT_OPERATORS
}
#undef DLK_RECURRENT_OPERATORS

Tensor pack_weights(const PackArguments& a);

// The shape of this thread's last call that reached a kernel, or null.
const LayerShape* last_shape();

CellKind cell_from_mode(const std::string& mode);

// The form of packed weights of so many bits, 0 for those of their dtype.
Weights weights_of_bits(int64_t bits);

}  // namespace dlk
