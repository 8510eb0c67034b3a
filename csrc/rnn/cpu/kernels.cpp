// The torch-free entry points, which plan a call, run it and record what ran; and the header of prepacked weights.
#include <cstring>
#include <iterator>

#include "rnn/cpu/last_run.h"
#include "rnn/cpu/table.h"

namespace dlk {
namespace {

thread_local LastRun g_last_run{};

struct PackedHeader {
  char magic[8];
  Isa isa;
  LayerShape shape;  // only what the panels depend on; the rest is 0
};
constexpr size_t kHeaderBytes = 128;
static_assert(sizeof(PackedHeader) <= kHeaderBytes, "the header must leave the panels aligned");

const KernelTable& layer_kernels(const LayerShape& shape, Isa isa) {
  return kernels(layer_isa(shape, isa), shape.weights);
}

PackedHeader header_of(const LayerShape& shape, Isa isa) {
  PackedHeader header;
  std::memset(&header, 0, sizeof header);  // padding too: headers are compared as bytes
  std::memcpy(header.magic, "dlkpack2", sizeof header.magic);
  header.isa = layer_kernels(shape, isa).isa;
  header.shape.cell = shape.cell;
  header.shape.dtype = shape.dtype;
  header.shape.weights = shape.weights;
  header.shape.I = shape.I;
  header.shape.H = shape.H;
  header.shape.P = shape.P;
  header.shape.D = shape.D;
  return header;
}

}  // namespace

void rnn_forward(const ForwardParams& params, const Runtime& runtime) {
  const LayerShape& shape = params.shape;
  Plan plan = rnn_plan(shape, runtime.isa, runtime.threads, false, params.deterministic, params.packed != nullptr);
  const SequenceLayout layout(shape, params.batch_sizes, params.lengths, params.resets);
  const void* panels = params.packed ? static_cast<const char*>(params.packed) + kHeaderBytes : nullptr;
  const KernelTable& table = kernels(plan.isa, shape.weights);
  const int members = table.forward(params, panels, plan, runtime, layout);
  plan.isa = table.isa;
  g_last_run = {plan, members, false};
}

void rnn_backward(const BackwardParams& params, const Runtime& runtime) {
  Plan plan = rnn_plan(params.shape, runtime.isa, runtime.threads, true, params.deterministic, false);
  const SequenceLayout layout(params.shape, params.batch_sizes, params.lengths, params.resets);
  const KernelTable& table = kernels(plan.isa, Weights::given);
  const int members = table.backward(params, plan, runtime, layout);
  plan.isa = table.isa;
  g_last_run = {plan, members, true};
}

size_t rnn_packed_bytes(const LayerShape& shape, Isa isa) {
  return kHeaderBytes + layer_kernels(shape, isa).panel_bytes(shape);
}

void rnn_pack(const LayerShape& shape, const DirectionWeights* weights, Isa isa, void* out) {
  std::memset(out, 0, kHeaderBytes);
  const PackedHeader header = header_of(shape, isa);
  std::memcpy(out, &header, sizeof header);
  layer_kernels(shape, isa).pack(shape, weights, static_cast<char*>(out) + kHeaderBytes);
}

Weights rnn_packed_weights(const void* packed, size_t bytes) {
  PackedHeader header;
  if (bytes < sizeof header) return Weights::given;
  std::memcpy(&header, packed, sizeof header);
  for (Weights weights : {Weights::bf16, Weights::int8})
    if (header.shape.weights == weights) return weights;
  return Weights::given;
}

bool rnn_packed_matches(const void* packed, size_t bytes, const LayerShape& shape, Isa isa) {
  const PackedHeader header = header_of(shape, isa);
  return bytes == rnn_packed_bytes(shape, isa) && std::memcmp(packed, &header, sizeof header) == 0;
}

const LastRun& rnn_last_run() { return g_last_run; }
void set_last_run(const LastRun& run) { g_last_run = run; }

const KernelTable& kernels(Isa isa, Weights weights) {
  static constexpr const KernelTable* kTables[] = {
#define DLK_ISA_ROW(name, features, vectors, bf16) &kLayers_##name,
#include "core/isas.def"
#undef DLK_ISA_ROW
  };
  static constexpr const KernelTable* kBf16Tables[] = {
#define DLK_ISA_ROW(name, features, vectors, bf16) &kBf16Weights_##name,
#include "core/isas.def"
#undef DLK_ISA_ROW
  };
  static constexpr const KernelTable* kInt8Tables[] = {
#define DLK_ISA_ROW(name, features, vectors, bf16) &kInt8Weights_##name,
#include "core/isas.def"
#undef DLK_ISA_ROW
  };
  static_assert(std::size(kTables) == kIsaCount, "tables are indexed by Isa");
  const auto of = [&](const auto& tables) -> const KernelTable& {
    const KernelTable& table = *tables[static_cast<int>(isa)];
    return table.forward ? table : *tables[static_cast<int>(Isa::scalar)];
  };
  // Instruction sets that multiply bfloat16 take the panels of bfloat16 layers.
  const bool widened = weights == Weights::bf16 && bf16_products(isa) == Bf16Products::as_float;
  return weights == Weights::int8 ? of(kInt8Tables) : widened ? of(kBf16Tables) : of(kTables);
}

}  // namespace dlk
