// Registers the recurrent operators for CUDA tensors. Their schemas are in rnn/torch/registration.cpp.
#include "rnn/torch/implement.h"

// The test of these operators without a GPU (tests/cuda/boundary.cpp) registers them for CPU tensors.
#ifndef DLKERNELS_GPU_KEY
#define DLKERNELS_GPU_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(dlkernels, DLKERNELS_GPU_KEY, library) {
  namespace device = dlk::on_cuda;
  dlk::RecurrentOperators<device::sequence_forward, device::sequence_backward, device::cell_forward,
                          device::cell_backward, device::variant_forward, device::variant_backward>::implement(library);
}
