// The recurrent operators for CUDA tensors. Their schemas stand in rnn/torch/registration.cpp.
#include "rnn/torch/implement.h"

// The test of this boundary without a GPU (tests/cuda/boundary.cpp) builds it for CPU tensors.
#ifndef DLKERNELS_GPU_KEY
#define DLKERNELS_GPU_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(dlkernels, DLKERNELS_GPU_KEY, library) {
  namespace device = dlk::on_cuda;
  dlk::RecurrentOperators<device::sequence_forward, device::sequence_backward, device::cell_forward,
                          device::cell_backward>::implement(library);
}
