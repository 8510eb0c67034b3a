// The torch-free entry points of attention: each makes a plan, runs it and records what ran.
#include <iterator>

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
  static constexpr const AttentionTable* kTables[] = {
#define DLK_ISA_ROW(name, features, vectors, bf16) &kAttention_##name,
#include "core/isas.def"
#undef DLK_ISA_ROW
  };
  static_assert(std::size(kTables) == kIsaCount, "tables are indexed by Isa");
  const AttentionTable& table = *kTables[static_cast<int>(isa)];
  return table.forward ? table : kAttention_scalar;
}

}  // namespace dlk
