// The torch-free entry points of layers with layer normalisation, zoneout and recurrent dropout.
#include <iterator>

#include "rnn/cpu/last_run.h"
#include "rnn/cpu/variants/table.h"

namespace dlk {
namespace {

const VariantTable& table_of(Isa isa) {
  static constexpr const VariantTable* kTables[] = {
#define DLK_ISA_ROW(name, features, vectors, bf16) &kVariants_##name,
#include "core/isas.def"
#undef DLK_ISA_ROW
  };
  static_assert(std::size(kTables) == kIsaCount, "tables are indexed by Isa");
  const VariantTable& table = *kTables[static_cast<int>(isa)];
  return table.forward ? table : *kTables[static_cast<int>(Isa::scalar)];
}

}  // namespace

Plan variant_plan(const LayerShape& shape, Isa isa, int threads, bool backward) {
  // `deterministic` leaves out the two ways of a plain call that a variant does not have: the dot path, and adding up
  // the products of x and h.
  Plan plan = rnn_plan(shape, isa, threads, backward, true, false);
  const Isa own = layer_isa(shape, isa);  // there are products of pairs, but none of tiles
  plan.isa = bf16_products(own) == Bf16Products::dots ? own : vector_isa(isa);
  return plan;
}

void variant_forward(const VariantForwardParams& params, const Runtime& runtime) {
  const ForwardParams& layer = params.layer;
  const Plan plan = variant_plan(layer.shape, runtime.isa, runtime.threads, false);
  const SequenceLayout layout(layer.shape, layer.batch_sizes, layer.lengths, nullptr);
  set_last_run({plan, table_of(plan.isa).forward(params, plan, runtime, layout), false});
}

void variant_backward(const VariantBackwardParams& params, const Runtime& runtime) {
  const BackwardParams& layer = params.layer;
  const Plan plan = variant_plan(layer.shape, runtime.isa, runtime.threads, true);
  const SequenceLayout layout(layer.shape, layer.batch_sizes, layer.lengths, nullptr);
  set_last_run({plan, table_of(plan.isa).backward(params, plan, runtime, layout), true});
}

}  // namespace dlk
