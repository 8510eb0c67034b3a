// What the plans must know of the GPU at hand. No CUDA and no torch in here.
#pragma once

#include "sequence.h"

namespace dlk {

// Of the current device, read once per process.
GpuLimits gpu_limits(int device);

const char* gpu_error_text(int error);

}  // namespace dlk
