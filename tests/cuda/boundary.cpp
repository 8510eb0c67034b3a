// Tests the torch boundary of the CUDA layers without a GPU. When this library is loaded after dlkernels, its recurrent
// operators replace those for CPU tensors and run the CUDA kernels under emulation.
#include <new>

#include "core/runtime_flags.h"
#include "rnn/cuda/gpu_limits.h"
#include "rnn/cuda/plan_cap.h"
#include "torch/tensor.h"

namespace dlk {

bool poison() { return true; }

GpuLimits gpu_limits(int) { return kH200; }

const char* gpu_error_text(int) { return "an error that the emulation does not have"; }

}  // namespace dlk

// There are no streams and no current device here. torch's own functions would fail without an accelerator.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

// The equivalent of the module's `cap_cuda_plan` for the plans that this library makes.
__attribute__((visibility("default"))) void boundary_cap_plan(int kind) {
  dlk::set_plan_cap(static_cast<dlk::SequencePlan::Kind>(kind));
}
}
