// Launches the kernel instance that carries out a plan, for one dtype.
#pragma once

#include "sequence_backward.h"
#include "sequence_forward.h"
#include "types.h"

namespace dlk {
namespace gpu {

template <class Params>
int launch_group(void (*kernel)(Params), const Params& params, const SequencePlan& plan, void* stream) {
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(plan.slices);
  shape.grid_y = static_cast<unsigned>(plan.groups / params.D);
  shape.grid_z = static_cast<unsigned>(params.D);
  shape.threads = kSequenceThreads;
  shape.shared_bytes = plan.layout.bytes;
  if (plan.kind == SequencePlan::cluster) {
    shape.cluster = shape.grid_x;
  } else {
    shape.cooperative = true;
    const int error = set_zero(params.counters, sizeof(unsigned) * static_cast<size_t>(plan.groups), stream);
    if (error) return error;
  }
  return launch(kernel, shape, stream, params);
}

template <class Cell, class S, bool kCluster, int kColumnTiles>
int launch_instance(const SequenceForward& params, const SequencePlan& plan, void* stream) {
  return launch_group(&sequence_forward<Cell, S, kCluster, kColumnTiles>, params, plan, stream);
}
template <class Cell, class S, bool kCluster, int kColumnTiles>
int launch_instance(const SequenceBackward& params, const SequencePlan& plan, void* stream) {
  return launch_group(&sequence_backward<Cell, S, kCluster, kColumnTiles>, params, plan, stream);
}

template <class Cell, class S, bool kCluster, class Params>
int launch_columns(const Params& params, const SequencePlan& plan, void* stream) {
  if constexpr (sizeof(S) == 2) {
    if (plan.column_tiles == 2) return launch_instance<Cell, S, kCluster, 2>(params, plan, stream);
  }
  return launch_instance<Cell, S, kCluster, 1>(params, plan, stream);
}

template <class Cell, class S, class Params>
int launch_kind(const Params& params, const SequencePlan& plan, void* stream) {
  return plan.kind == SequencePlan::cluster ? launch_columns<Cell, S, true>(params, plan, stream)
                                            : launch_columns<Cell, S, false>(params, plan, stream);
}

template <class S, class Params>
int launch_dtype(const Params& params, const SequencePlan& plan, void* stream) {
  return with_cell(params.cell, [&](auto cell) { return launch_kind<decltype(cell), S>(params, plan, stream); });
}

}  // namespace gpu
}  // namespace dlk
