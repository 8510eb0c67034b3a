// The torch-free entry points of attention: plan, run, remember.
#include "table.h"

namespace dlk {
namespace {

thread_local AttentionLastRun g_last_run{};

}  // namespace

void attention_forward(const AttentionForwardParams& params, const Runtime& runtime) {
  AttentionPlan plan = attention_plan(params.in, runtime.isa, runtime.threads, false, false);
  const AttentionTable& table = attention_kernels(plan.isa);
  const int members = table.forward(params, plan, runtime);
  plan.isa = table.isa;
  g_last_run = {plan, members, false};
}

void attention_backward(const AttentionBackwardParams& params, const Runtime& runtime) {
  AttentionPlan plan = attention_plan(params.in, runtime.isa, runtime.threads, true, params.dmask.data != nullptr);
  const AttentionTable& table = attention_kernels(plan.isa);
  const int members = table.backward(params, plan, runtime);
  plan.isa = table.isa;
  g_last_run = {plan, members, true};
}

void attention_map(const AttentionMapParams& params, const Runtime& runtime) {
  const AttentionPlan plan = attention_plan(params.in, runtime.isa, runtime.threads, false, false);
  attention_kernels(plan.isa).map(params, plan, runtime);
}

const AttentionLastRun& attention_last_run() { return g_last_run; }

const AttentionTable& attention_kernels(Isa isa) {
#ifdef DLK_AMX
  if (isa == Isa::amx) return amx::kAttention;
#endif
#ifdef DLK_AVX512_BF16
  if (isa == Isa::avx512_bf16) return avx512_bf16::kAttention;
#endif
#ifdef DLK_X86
  if (isa == Isa::avx512) return avx512::kAttention;
  if (isa == Isa::avx2) return avx2::kAttention;
#endif
  (void)isa;
  return scalar::kAttention;
}

}  // namespace dlk
