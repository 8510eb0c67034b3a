// The limits of a GPU that its plans depend on. No CUDA and no torch in here.
#pragma once

#include "sequence.h"

namespace dlk {

// Read once per process and device.
GpuLimits gpu_limits(int device);

const char* gpu_error_text(int error);

}  // namespace dlk
