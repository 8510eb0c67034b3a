// Decides before anything runs how a call of attention is carried out. The kernels follow this plan.
#include <algorithm>

#include "core/plan_constants.h"
#include "tasks.h"

namespace dlk {
AttentionPlan attention_plan(const AttentionInputs& in, Isa isa, int threads, bool backward, bool mask_gradient) {
  const PlanConstants& measured = plan_constants(isa);
  const AttentionShape& s = in.shape;
  int64_t M = 0, N = 0;  // of the longest sequence
  double pairs = 0;
  for (int64_t b = 0; b < (in.cu_q ? s.B : std::min<int64_t>(1, s.B)); ++b) {
    const AttentionSequence sequence(in, b);
    M = std::max(M, sequence.M), N = std::max(N, sequence.N);
    pairs +=
        static_cast<double>(sequence.M) * static_cast<double>(sequence.N) * (in.cu_q ? 1 : static_cast<double>(s.B));
  }
  const int64_t rows = std::max<int64_t>(1, M * s.group());
  const double work = pairs * static_cast<double>(s.H) * static_cast<double>(s.D + s.Dv) * (backward ? 2.5 : 1);

  AttentionPlan plan{};
  plan.threads = work < measured.attention_serial_work ? 1 : std::min(std::max(threads, 1), kMaxMembers);
  plan.kernel = rows <= measured.attention_dot_rows ? AttentionPlan::dot : AttentionPlan::tiles;
  // Units that multiply bf16 are only for tiles: products of few rows wait for the memory anyway.
  const bool units = s.dtype == DType::bf16 && plan.kernel == AttentionPlan::tiles;
  plan.isa = units ? isa : vector_isa(isa);
  const bool converted = !backward && (s.dtype == DType::bf16 || s.dtype == DType::f16);
  plan.block_m = std::min(converted ? measured.attention_converted_block_rows : measured.attention_block_rows,
                          (rows + 15) / 16 * 16);
  plan.block_n = measured.attention_block_keys;
  const int64_t wanted = backward ? measured.attention_backward_tasks : measured.attention_tasks;
  int64_t tasks, most;
  if (backward) {
    const int64_t dq = std::max<int64_t>(1, in.cu_q ? s.H * s.M * s.D : s.B * s.H * s.M * s.D);
    tasks = AttentionTasks::of_keys(in, mask_gradient).groups();
    most = std::min(N / measured.attention_backward_split_keys,
                    std::max(measured.attention_parts, measured.attention_part_elements / dq));
  } else {
    tasks = s.B * s.Hkv * ((rows + plan.block_m - 1) / plan.block_m);
    most = N / measured.attention_split_keys;
  }
  tasks = std::max<int64_t>(1, tasks);
  plan.splits = std::max<int64_t>(1, std::min((wanted + tasks - 1) / tasks, most));
  return plan;
}

}  // namespace dlk
