// Decides how the recurrent part of a layer runs on a GPU, before anything is launched.
#include <algorithm>
#include <cstdio>

#include "sequence.h"

namespace dlk {
namespace {

// With more chunks than this at every step, one large product over the whole batch is faster than resident weights.
constexpr int kMaxChunks = 8;
constexpr int kMaxTile = 128;

struct Candidate {
  SequencePlan::Kind kind;
  int max_groups;  // that can run at once
};

SharedLayout make_layout(const SliceShape& slice, const LayerShape& shape, const SequencePlan& plan, bool backward,
                         int gap) {
  const bool half = shape.dtype != DType::f32;
  const int gates = gate_count(shape.cell), item = half ? 2 : 4;
  SharedLayout l{};
  l.terms = round_up(plan.slices * slice.units * (backward ? gates : 1), 32);
  // The stride is 64 bytes more than a multiple of 128, so that there are no bank conflicts between eight lanes that
  // read 16 bytes each from two sequences.
  l.stride = half && l.terms % 64 == 0 ? l.terms + 32 : l.terms;
  l.shared_steps = std::max(0, ceil_div(l.terms / slice.step_terms, slice.splits) - slice.register_steps);
  int at = 0;
  const auto take = [&](int bytes) {
    const int begin = at;
    at = round_up(at + bytes + gap, 16);
    return begin;
  };
  l.weights = take(slice.splits * l.shared_steps * slice.step_terms * slice.rows * item);
  // In a grid the exchange is in global memory; float32 vectors are copied from there one chunk at a time.
  const int vectors = plan.kind == SequencePlan::cluster ? 2 * plan.tile : half ? 0 : kMmaColumns;
  l.exchange = take(vectors * l.stride * item);
  l.partials = take(2 * slice.splits * kMmaColumns * plan.column_tiles * (slice.rows + 4) * 4);
  l.states = take(2 * plan.tile * slice.units * 4);
  l.bias = take((gates + 1) * slice.units * 4);
  l.lengths = take((plan.tile + plan.tile / kMmaColumns) * 4);
  l.receipts = take(plan.kind == SequencePlan::cluster ? 2 * 8 : 0);
  l.bytes = at;
  return l;
}

// Chooses the smallest tile with which all groups run at once; if there is none, the smallest of those with the fewest
// waves of groups. A tile must fit into shared memory and must not take more than kMaxChunks chunks in all waves. A
// grid must have a single wave.
bool choose_tile(const LayerShape& shape, const GpuLimits& gpu, const Candidate& candidate, const SliceShape& slice,
                 bool backward, int gap, SequencePlan* plan) {
  const bool half = shape.dtype != DType::f32;
  bool found = false;
  for (int tile = kMmaColumns; tile <= kMaxTile; tile += kMmaColumns) {
    SequencePlan next = *plan;
    next.tile = tile;
    next.column_tiles = half && tile >= 2 * kMmaColumns ? 2 : 1;
    if (tile % (next.column_tiles * kMmaColumns)) continue;
    const int tiles = static_cast<int>((shape.B + tile - 1) / tile);
    next.groups = shape.D * tiles;
    next.groups_at_once = candidate.max_groups;
    next.layout = make_layout(slice, shape, next, backward, gap);
    if (next.layout.bytes > gpu.shared_bytes) break;
    const int chunks = tile / (next.column_tiles * kMmaColumns);
    const int waves = ceil_div(next.groups, candidate.max_groups);
    if (chunks * waves > kMaxChunks || (waves > 1 && candidate.kind == SequencePlan::grid)) continue;
    const bool better = !found || waves < ceil_div(plan->groups, candidate.max_groups);
    if (better) *plan = next;
    found = true;
    if (waves == 1) break;
  }
  return found;
}

}  // namespace

SequencePlan sequence_plan(const LayerShape& shape, const GpuLimits& gpu, bool backward, int gap) {
  const int gates = gate_count(shape.cell);
  const bool half = shape.dtype != DType::f32;
  const auto slices = [&](bool cluster) {
    const int64_t units = slice_shape(gates, half, cluster, backward).units;
    return (shape.H + units - 1) / units;
  };
  const char* why_no_cluster = "";
  char text[80];

  SequencePlan plan{};
  const int64_t in_cluster = slices(true), in_grid = slices(false);
  const int size = in_cluster <= 8 ? 8 : 16;
  if (gpu.clusters_8 == 0) {
    why_no_cluster = "this GPU has no clusters of blocks";
  } else if (in_cluster > 16 || (in_cluster > 8 && gpu.clusters_16 == 0)) {
    std::snprintf(text, sizeof text, "%lld slices of W_hh are more than a cluster holds",
                  static_cast<long long>(in_cluster));
    why_no_cluster = text;
  } else {
    plan.kind = SequencePlan::cluster;
    plan.slices = static_cast<int>(in_cluster);
    const int at_once = size == 8 ? gpu.clusters_8 * (8 / plan.slices) : gpu.clusters_16;
    if (choose_tile(shape, gpu, {plan.kind, at_once}, slice_shape(gates, half, true, backward), backward, gap, &plan)) {
      std::snprintf(plan.reason, sizeof plan.reason,
                    "W_hh stays in the registers and shared memory of %d blocks, which wait for each other at a "
                    "cluster's barrier",
                    plan.slices);
      return plan;
    }
    why_no_cluster = "the batch or W_hh is too large for clusters";
  }
  const char* why_no_grid = "W_hh does not fit into the GPU's shared memory and registers";
  if (in_grid * shape.D <= gpu.multiprocessors) {
    plan = {};
    plan.kind = SequencePlan::grid;
    plan.slices = static_cast<int>(in_grid);
    const int at_once = gpu.multiprocessors / plan.slices;
    if (choose_tile(shape, gpu, {plan.kind, at_once}, slice_shape(gates, half, false, backward), backward, gap,
                    &plan)) {
      std::snprintf(plan.reason, sizeof plan.reason,
                    "W_hh stays on the chip, in %d blocks that wait for each other at a barrier in global memory: %s",
                    plan.slices, why_no_cluster);
      return plan;
    }
    why_no_grid = "the batch or W_hh is too large to keep W_hh on the chip";
  }
  plan = {};
  plan.kind = SequencePlan::steps;
  std::snprintf(plan.reason, sizeof plan.reason, "a product and a fused cell kernel at every step: %s", why_no_grid);
  return plan;
}

}  // namespace dlk
