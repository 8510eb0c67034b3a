#include "sequence_launch.h"

namespace dlk {

template <>
int launch_sequence<DType::f16>(const SequenceBackward& params, const SequencePlan& plan, void* stream) {
  return gpu::launch_dtype<f16_t>(params, plan, stream);
}

}  // namespace dlk
