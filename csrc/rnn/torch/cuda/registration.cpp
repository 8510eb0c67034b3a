// The operators for CUDA tensors: their registration. The schemas stand in ../ops.cpp.
#include "torch/boxing.h"
#include "ops.h"

namespace dlk {
namespace {

using Opt = OptionalTensor;

// One instance per mode; determinism is always kept, and weights cannot be prepacked for CUDA.
template <CellKind cell>
struct GpuOps {
  static SequenceOutputs forward(const Tensor& x, const Opt& h0, const Opt& c0, const TensorList& weights,
                                 const Opt& packed, const Opt& batch_sizes, const Opt& lengths, bool bidirectional,
                                 bool batch_first, bool save, bool /*deterministic*/, int64_t product_dtype,
                                 int64_t h_dtype, int64_t c_dtype) {
    DLK_CHECK(!packed, "prepacked weights are for the CPU");
    return gpu_sequence_forward(cell, x, h0, c0, weights, batch_sizes, lengths, bidirectional, batch_first, save,
                                {product_dtype, h_dtype, c_dtype});
  }
  static TensorList backward(const Opt& dy, const Opt& dh_n, const Opt& dc_n, const Tensor& x, const Opt& h0,
                             const Opt& c0, const TensorList& weights, const Tensor& saved, const Opt& batch_sizes,
                             const Opt& lengths, bool bidirectional, bool batch_first, int64_t bptt_steps,
                             bool /*deterministic*/, bool need_x, bool need_state, bool need_weights, bool gate_grads,
                             int64_t product_dtype) {
    return gpu_sequence_backward(cell, dy, dh_n, dc_n, x, h0, c0, weights, saved, batch_sizes, lengths, bidirectional,
                                 batch_first, bptt_steps, need_x, need_state, need_weights, gate_grads,
                                 {product_dtype});
  }
  static TensorList step(const Tensor& x, const Opt& h, const Opt& c, const Tensor& w_ih, const Tensor& w_hh,
                         const Opt& b_ih, const Opt& b_hh, bool save, bool /*deterministic*/, int64_t product_dtype,
                         int64_t h_dtype, int64_t c_dtype) {
    return gpu_cell_forward(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, save, {product_dtype, h_dtype, c_dtype});
  }
  static TensorList step_backward(const Opt& dh, const Opt& dc, const Tensor& x, const Opt& h, const Opt& c,
                                  const Tensor& w_ih, const Tensor& w_hh, const Opt& b_ih, const Opt& b_hh,
                                  const Tensor& saved, bool /*deterministic*/, bool need_x, bool need_state,
                                  bool need_weights, bool gate_grads, int64_t product_dtype) {
    return gpu_cell_backward(cell, dh, dc, x, h, c, w_ih, w_hh, b_ih, b_hh, saved, need_x, need_state, need_weights,
                             gate_grads, {product_dtype});
  }
};

template <CellKind cell>
void implement(torch::stable::detail::StableLibrary& library) {
  const std::string mode = mode_name(cell);
  library.impl(mode.c_str(), &Boxed<&GpuOps<cell>::forward>::kernel);
  library.impl((mode + "_backward").c_str(), &Boxed<&GpuOps<cell>::backward>::kernel);
  library.impl((mode + "_cell").c_str(), &Boxed<&GpuOps<cell>::step>::kernel);
  library.impl((mode + "_cell_backward").c_str(), &Boxed<&GpuOps<cell>::step_backward>::kernel);
}

}  // namespace
}  // namespace dlk

// The test of this boundary without a GPU (tests/cuda/boundary.cpp) builds it for CPU tensors.
#ifndef DLKERNELS_GPU_KEY
#define DLKERNELS_GPU_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(dlkernels, DLKERNELS_GPU_KEY, library) {
  using dlk::CellKind;
  dlk::implement<CellKind::lstm>(library);
  dlk::implement<CellKind::gru>(library);
  dlk::implement<CellKind::rnn_tanh>(library);
  dlk::implement<CellKind::rnn_relu>(library);
}
