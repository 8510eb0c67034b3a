#include "sequence_launch.h"

namespace dlk {

template <>
int launch_sequence<DType::f32>(const SequenceBackward& params, const SequencePlan& plan, void* stream) {
  return gpu::launch_dtype<float>(params, plan, stream);
}

}  // namespace dlk
