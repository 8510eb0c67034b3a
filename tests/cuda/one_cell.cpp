// The sequence kernels of the lstm, forward or backward, in bf16 and float32. The mutants are tested with these alone,
// since all kernels would take minutes to compile. This file is copied beside the mutated headers.
#if defined(ONE_CELL_FORWARD) == defined(ONE_CELL_BACKWARD)
#error "one of ONE_CELL_FORWARD and ONE_CELL_BACKWARD"
#endif
#include "sequence_launch.h"

namespace dlk {

#ifdef ONE_CELL_FORWARD
using Params = SequenceForward;
#else
using Params = SequenceBackward;
#endif

template <>
int launch_sequence<DType::bf16>(const Params& params, const SequencePlan& plan, void* stream) {
  return gpu::launch_kind<gpu::LstmCell, bf16_t>(params, plan, stream);
}
template <>
int launch_sequence<DType::f16>(const Params&, const SequencePlan&, void*) {
  return 1;
}
template <>
int launch_sequence<DType::f32>(const Params& params, const SequencePlan& plan, void* stream) {
  return gpu::launch_kind<gpu::LstmCell, float>(params, plan, stream);
}

}  // namespace dlk
