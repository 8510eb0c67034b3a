// The sequence kernels of the lstm in bfloat16 alone, for mutants: the other kernels would take minutes to compile. It
// is copied beside the mutated headers.
#include "sequence_launch.h"

namespace dlk {

template <class Params>
int launch_lstm(const Params& params, const SequencePlan& plan, void* stream) {
  return gpu::launch_kind<gpu::LstmCell, bf16_t>(params, plan, stream);
}

template <>
int launch_sequence<DType::bf16>(const SequenceForward& params, const SequencePlan& plan, void* stream) {
  return launch_lstm(params, plan, stream);
}
template <>
int launch_sequence<DType::bf16>(const SequenceBackward& params, const SequencePlan& plan, void* stream) {
  return launch_lstm(params, plan, stream);
}
template <>
int launch_sequence<DType::f16>(const SequenceForward&, const SequencePlan&, void*) {
  return 1;
}
template <>
int launch_sequence<DType::f16>(const SequenceBackward&, const SequencePlan&, void*) {
  return 1;
}
template <>
int launch_sequence<DType::f32>(const SequenceForward&, const SequencePlan&, void*) {
  return 1;
}
template <>
int launch_sequence<DType::f32>(const SequenceBackward&, const SequencePlan&, void*) {
  return 1;
}

}  // namespace dlk
