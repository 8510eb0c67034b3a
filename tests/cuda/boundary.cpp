// The torch boundary of the CUDA layers without a GPU: loaded after dlkernels, this library takes over the recurrent
// operators for CPU tensors, with the kernels under emulation.
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

// Streams and current devices mean nothing here; torch's own functions would ask for an accelerator.
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

// The `cap_cuda_plan` of this library's plans.
__attribute__((visibility("default"))) void boundary_cap_plan(int kind) {
  dlk::set_plan_cap(static_cast<dlk::SequencePlan::Kind>(kind));
}
}
