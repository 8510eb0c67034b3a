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

template <class Cell, class S, bool kCluster, int kUnits, int kColumns>
int launch_instance(const SequenceForward& params, const SequencePlan& plan, void* stream) {
  return launch_group(&sequence_forward<Cell, S, kCluster, kUnits, kColumns>, params, plan, stream);
}
template <class Cell, class S, bool kCluster, int kUnits, int kColumns>
int launch_instance(const SequenceBackward& params, const SequencePlan& plan, void* stream) {
  return launch_group(&sequence_backward<Cell, S, kCluster, kUnits, kColumns>, params, plan, stream);
}

template <class Cell, class S, bool kCluster, int kUnits, class Params>
int launch_columns(const Params& params, const SequencePlan& plan, void* stream) {
  if constexpr (sizeof(S) == 4) {
    if (plan.columns == 1) return launch_instance<Cell, S, kCluster, kUnits, 1>(params, plan, stream);
    if (plan.columns == 2) return launch_instance<Cell, S, kCluster, kUnits, 2>(params, plan, stream);
    if (plan.columns == 4) return launch_instance<Cell, S, kCluster, kUnits, 4>(params, plan, stream);
  } else {
    if (plan.columns == 16) return launch_instance<Cell, S, kCluster, kUnits, 16>(params, plan, stream);
  }
  if (plan.columns != 8) return kInvalidValue;
  return launch_instance<Cell, S, kCluster, kUnits, 8>(params, plan, stream);
}

template <class Cell, class S, class Params>
int launch_kind(const Params& params, const SequencePlan& plan, void* stream) {
  constexpr int of_grid = slice_units(Cell::kGates, SliceWidth::grid);
  constexpr int of_cluster = slice_units(Cell::kGates, SliceWidth::cluster);
  constexpr int wide = slice_units(Cell::kGates, SliceWidth::wide_cluster);
  if (plan.kind == SequencePlan::grid) {
    if (plan.units == of_grid) return launch_columns<Cell, S, false, of_grid>(params, plan, stream);
    return kInvalidValue;
  }
  if (plan.units == of_cluster) return launch_columns<Cell, S, true, of_cluster>(params, plan, stream);
  if constexpr (sizeof(S) == 2 && wide > 0) {
    // Two tensor-core products at once would leave no room for the partial sums of wide slices.
    if (plan.units == wide && plan.columns == 8) return launch_instance<Cell, S, true, wide, 8>(params, plan, stream);
  }
  return kInvalidValue;
}

template <class S, class Params>
int launch_dtype(const Params& params, const SequencePlan& plan, void* stream) {
  return with_cell(params.cell, [&](auto cell) { return launch_kind<decltype(cell), S>(params, plan, stream); });
}

}  // namespace gpu
}  // namespace dlk
