// Decides how a call is carried out, before anything runs. The kernels follow the plan.
#include <algorithm>

#include "rnn/cpu/table.h"

namespace dlk {
namespace {

// In a call of fewer multiply-adds, waking a thread costs more time than it saves.
constexpr double kSerialWork = 200e3;
// A step that is split over hidden units ends in a barrier of about half a microsecond. The split pays
// if it saves each core this many multiply-adds, of the step and its input product.
constexpr double kUnitsWorkSaved = 20e3;
// If the batch is split, no core waits for another, but each reads all of W_hh at every step. A W_hh of up to
// kPrivateCacheBytes is read from the core's own cache, and kOwnRows sequences per core are enough. A larger one is
// read from the shared cache, and it takes kOwnRowsBeyond sequences per core to hide the time of reading.
constexpr int64_t kPrivateCacheBytes = 1 << 20;
constexpr int64_t kOwnRows = 8, kOwnRowsBeyond = 32;
// In a call of one step, a split batch would also make each core pack all weights for itself: with this many hidden
// units per core, the units are split instead.
constexpr int64_t kOwnUnits = 128;
// Rows per GEMM of a chunk: enough to use each panel of weights many times.
constexpr int64_t kChunkRows = 384;
// With at least kFusedRows rows per step, W_ih is read at every step like W_hh, provided that both stay in the caches
// (kFusedBytes): the products of x then need not be written to memory and read back.
constexpr int64_t kFusedRows = 8, kFusedBytes = 16 << 20;
// Up to this many rows are multiplied with the unpacked weights.
constexpr int64_t kDotRows = 8;
constexpr double kWorkPerMicrosecond = 20e3;  // multiply-adds of one core, roughly

}  // namespace

Isa layer_isa(const LayerShape& shape, Isa isa) {
  const bool own_products = shape.dtype == DType::bf16 && shape.P == 0;
  return own_products && bf16_products(isa) != Bf16Products::as_float ? isa : vector_isa(isa);
}

Plan rnn_plan(const LayerShape& shape, Isa isa, int threads, bool backward, bool deterministic, bool packed_weights) {
  const int64_t gates = gate_count(shape.cell), outputs = shape.outputs();
  const double rows = static_cast<double>(std::max<int64_t>(1, shape.rows));
  const double recurrent = static_cast<double>(gates * shape.H) * outputs + static_cast<double>(shape.P) * shape.H;
  const double per_row = recurrent + static_cast<double>(gates * shape.H) * shape.I;
  const double work = rows * per_row * shape.D * (backward ? 2 : 1);
  const double work_per_step = per_row * rows / std::max<int64_t>(1, shape.T);

  Plan plan{};
  plan.threads = std::min(std::max(threads, 1), kMaxMembers);
  plan.split = Plan::serial;
  // Packing the weights costs about as much as the products of a few rows with them.
  plan.recurrence = !backward && !deterministic && !packed_weights && shape.rows <= kDotRows ? Plan::dot : Plan::tiles;
  plan.isa = plan.recurrence == Plan::dot ? vector_isa(isa) : layer_isa(shape, isa);
  const int64_t item = shape.dtype == DType::f64 ? 8 : bf16_products(plan.isa) != Bf16Products::as_float ? 2 : 4;
  const int64_t weight_bytes = gates * shape.H * outputs * item;
  // Not for the gru, whose n needs the two products separately, and not if a sequence's result must be independent of
  // the batch size.
  const bool fused = !backward && !deterministic && plan.recurrence == Plan::tiles &&
                     cell_traits(shape.cell).parted_gate == kNone && shape.T > 1 &&
                     shape.rows >= kFusedRows * shape.T &&
                     weight_bytes + gates * shape.H * shape.I * item <= kFusedBytes;
  plan.chunk_steps = fused ? 0 : std::max<int64_t>(1, kChunkRows / std::max<int64_t>(1, shape.B));
  plan.patience_us =
      std::min<int64_t>(2000, std::max<int64_t>(20, static_cast<int64_t>(work / kWorkPerMicrosecond / 4)));
  if (plan.threads == 1 || work < kSerialWork) {
    plan.threads = 1;
    return plan;
  }

  plan.directions_side_by_side = shape.D == 2;
  const int per_direction = shape.D == 2 ? (plan.threads + 1) / 2 : plan.threads;
  if (per_direction == 1) {
    plan.split = Plan::rows;  // one thread per direction
  } else if ((shape.T > 1 || shape.H < per_direction * kOwnUnits) &&
             shape.B >= per_direction * (weight_bytes <= kPrivateCacheBytes ? kOwnRows : kOwnRowsBeyond)) {
    plan.split = Plan::rows;
  } else if (work_per_step * (1 - 1.0 / per_direction) >= kUnitsWorkSaved) {
    plan.split = Plan::units;
  } else if (shape.B >= per_direction) {
    plan.split = Plan::rows;
  } else {
    plan.split = Plan::serial;
    plan.threads = shape.D;
  }
  // Each thread then runs its own GEMMs. Not in the backward, where chunks are shared and sums must not depend on the
  // number of threads.
  if (plan.split == Plan::rows && !backward) plan.chunk_steps *= per_direction;
  return plan;
}

}  // namespace dlk
