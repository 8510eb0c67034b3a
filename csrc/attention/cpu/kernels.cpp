// The torch-free entry points of attention: plan, run, remember.
#include "attention/cpu/table.h"

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
  const AttentionTable* table = &kAttention_scalar;
  switch (isa) {
#define DLK_ISA_ROW(name, features, vectors, bf16) \
  case Isa::name:                                  \
    table = &kAttention_##name;                    \
    break;
#include "core/isas.def"
#undef DLK_ISA_ROW
  }
  return table->forward ? *table : kAttention_scalar;
}

}  // namespace dlk
