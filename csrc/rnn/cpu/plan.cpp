// Decides how a call is carried out, before anything runs. The kernels follow the plan.
#include <algorithm>

#include "core/plan_constants.h"
#include "rnn/cpu/table.h"

namespace dlk {

Isa layer_isa(const LayerShape& shape, Isa isa) {
  // Layers with a projection take no quads of int8.
  const bool own_products =
      shape.weights == Weights::int8 ? shape.P == 0 : shape.dtype == DType::bf16 || shape.weights == Weights::bf16;
  return own_products && bf16_products(isa) != Bf16Products::as_float ? isa : vector_isa(isa);
}

Plan rnn_plan(const LayerShape& shape, Isa isa, int threads, bool backward, bool deterministic, bool packed_weights) {
  const PlanConstants& measured = plan_constants(isa);
  const int64_t gates = gate_count(shape.cell), outputs = shape.outputs();
  const double rows = static_cast<double>(std::max<int64_t>(1, shape.rows));
  const double recurrent = static_cast<double>(gates * shape.H) * outputs + static_cast<double>(shape.P) * shape.H;
  const double per_row = recurrent + static_cast<double>(gates * shape.H) * shape.I;
  const double work = rows * per_row * shape.D * (backward ? 2 : 1);
  const double work_per_step = per_row * rows / std::max<int64_t>(1, shape.T);

  Plan plan{};
  plan.threads = std::min(std::max(threads, 1), kMaxMembers);
  plan.split = Plan::serial;
  // Packing the weights costs about as much as the products of a few rows with them, and of more rows if the weights
  // do not stay in the core's cache. But in many steps it pays to read packed weights.
  const bool beyond = shape.dtype == DType::f32 && shape.T <= measured.rnn_dot_rows &&
                      4 * per_row > static_cast<double>(measured.rnn_private_cache_bytes);
  const bool few = shape.rows <= (beyond ? measured.rnn_dot_rows_beyond : measured.rnn_dot_rows);
  plan.recurrence = !backward && !deterministic && !packed_weights && few ? Plan::dot : Plan::tiles;
  plan.isa = plan.recurrence == Plan::dot ? vector_isa(isa) : layer_isa(shape, isa);
  const bool halves = shape.weights == Weights::bf16 || bf16_products(plan.isa) != Bf16Products::as_float;
  const int64_t item = shape.weights == Weights::int8 ? 1 : shape.dtype == DType::f64 ? 8 : halves ? 2 : 4;
  const int64_t weight_bytes = gates * shape.H * outputs * item;
  // Not for the gru, whose n needs the two products separately, nor for int8 weights, whose sums have other scales, and
  // not if a sequence's result must be independent of the batch size.
  const bool fused = !backward && !deterministic && plan.recurrence == Plan::tiles && shape.weights != Weights::int8 &&
                     cell_traits(shape.cell).parted_gate == kNone && shape.T > 1 &&
                     shape.rows >= measured.rnn_fused_rows * shape.T &&
                     weight_bytes + gates * shape.H * shape.I * item <= measured.rnn_fused_bytes;
  plan.chunk_steps = fused ? 0 : std::max<int64_t>(1, measured.rnn_chunk_rows / std::max<int64_t>(1, shape.B));
  plan.patience_us = std::min<int64_t>(
      2000, std::max<int64_t>(20, static_cast<int64_t>(work / measured.rnn_work_per_microsecond / 4)));
  if (plan.threads == 1 || work < measured.rnn_serial_work) {
    plan.threads = 1;
    return plan;
  }

  plan.directions_side_by_side = shape.D == 2;
  const int per_direction = shape.D == 2 ? (plan.threads + 1) / 2 : plan.threads;
  if (per_direction == 1) {
    plan.split = Plan::rows;  // one thread per direction
  } else if ((shape.T > 1 || shape.H < per_direction * measured.rnn_own_units) &&
             shape.B >= per_direction * (weight_bytes <= measured.rnn_private_cache_bytes
                                             ? measured.rnn_own_rows
                                             : measured.rnn_own_rows_beyond)) {
    plan.split = Plan::rows;
  } else if (work_per_step * (1 - 1.0 / per_direction) >= measured.rnn_units_work_saved) {
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
