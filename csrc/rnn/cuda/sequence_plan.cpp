// Decides how the recurrent part of a layer runs on a GPU, before anything is launched.
#include <algorithm>
#include <cstdio>

#include "sequence.h"

namespace dlk {
namespace {

// With more chunks than this at every step, one large product over the whole batch is faster than resident weights.
constexpr int kMaxChunks = 8;
constexpr int kMaxTile = 128;

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
  const int vectors = plan.kind == SequencePlan::cluster ? 2 * plan.tile : half ? 0 : plan.columns;
  l.exchange = take(vectors * l.stride * item);
  int partials = 2 * slice.splits * plan.columns * (slice.rows + 4);
  // At its end the backward adds up the bias gradients of its threads there.
  if (backward) partials = std::max(partials, gate_grad_slots(shape.cell) * kSequenceThreads);
  l.partials = take(partials * 4);
  l.states = take(2 * plan.tile * slice.units * 4);
  l.bias = take((gates + 1) * slice.units * 4);
  l.lengths = take((plan.tile + plan.tile / plan.columns) * 4);
  l.receipts = take(plan.kind == SequencePlan::cluster ? 2 * 8 : 0);
  l.bytes = at;
  return l;
}

// A guess of the cycles that a step takes, by which plans are compared: for every wave of groups the exchange between
// blocks, and for every chunk the product, or reading the weights for it, and what remains (partial sums, cells).
// Nothing of it is measured. The exchange of a grid has a high price, so that clusters are taken if the rest takes
// about as long in both.
int64_t step_cycles(const SequencePlan& plan, const SliceShape& slice, bool half, int waves) {
  const int64_t exchange = plan.kind == SequencePlan::cluster ? 800 : 1900;
  const int64_t product = int64_t{slice.rows} * plan.layout.terms * plan.columns / (half ? 1270 : 128);
  const int64_t weights = (plan.layout.exchange - plan.layout.weights) / 128;
  const int64_t chunk = std::max(product, weights) + 500 + 10 * plan.columns;
  return waves * (exchange + plan.tile / plan.columns * chunk);
}

// Chooses tile and columns for a plan whose kind, slices, units and groups_at_once are set: the fastest by the guess,
// and if several are the smallest tile. Returns its cycles, or 0 if there is none. A tile must fit into shared memory
// and must not take more than kMaxChunks chunks in all waves of groups. A grid must have a single wave.
int64_t choose_tile(const LayerShape& shape, const GpuLimits& gpu, bool wide, bool backward, int gap,
                    SequencePlan* plan) {
  const bool half = shape.dtype != DType::f32;
  const SliceShape slice = slice_shape(gate_count(shape.cell), half, plan->units, backward);
  SequencePlan best{};
  int64_t least = 0;
  for (int columns : {1, 2, 4, 8, 16}) {
    // A tensor-core product has 8 columns. Those of wide slices leave no room for the partial sums of two at once.
    if (half ? columns < kMmaColumns || (wide && columns > kMmaColumns) : columns > 8) continue;
    // Fewer columns than 8 are for tiles that have no more.
    for (int tile = columns; tile <= (columns < 8 ? columns : kMaxTile); tile += columns) {
      SequencePlan next = *plan;
      next.tile = tile;
      next.columns = columns;
      next.groups = static_cast<int>(shape.D * ((shape.B + tile - 1) / tile));
      next.layout = make_layout(slice, shape, next, backward, gap);
      if (next.layout.bytes > gpu.shared_bytes) continue;
      const int waves = ceil_div(next.groups, plan->groups_at_once);
      if (tile / columns * waves > kMaxChunks || (waves > 1 && plan->kind == SequencePlan::grid)) continue;
      const int64_t cycles = step_cycles(next, slice, half, waves);
      if (least && (least < cycles || (least == cycles && best.tile <= tile))) continue;
      best = next, least = cycles;
    }
  }
  if (least) *plan = best;
  return least;
}

}  // namespace

SequencePlan sequence_plan(const LayerShape& shape, const GpuLimits& gpu, bool backward, int gap) {
  const int gates = gate_count(shape.cell);
  const bool half = shape.dtype != DType::f32;
  // Sets what does not depend on the tile and returns the number of slices.
  const auto begin = [&](SequencePlan::Kind kind, SliceWidth width, SequencePlan* plan) {
    *plan = {};
    plan->kind = kind;
    plan->units = slice_units(gates, width);
    const int64_t slices = (shape.H + plan->units - 1) / plan->units;
    plan->slices = static_cast<int>(std::min<int64_t>(slices, 1 << 20));
    return slices;
  };
  SequencePlan best{}, plan{};
  int64_t least = 0;
  const auto consider = [&](bool wide) {
    const int64_t cycles = choose_tile(shape, gpu, wide, backward, gap, &plan);
    if (cycles && (least == 0 || cycles < least)) best = plan, least = cycles;
    return cycles > 0;
  };
  char why_no_cluster[80] = "this GPU has no clusters of blocks";
  for (SliceWidth width : {SliceWidth::cluster, SliceWidth::wide_cluster}) {
    const bool wide = width == SliceWidth::wide_cluster;
    if (!gpu.has_clusters() || least || (wide && (!half || slice_units(gates, width) == 0))) break;
    const int64_t slices = begin(SequencePlan::cluster, width, &plan);
    const char* why = "the batch or W_hh is too large for clusters";
    if (slices > kMaxCluster) {
      std::snprintf(why_no_cluster, sizeof why_no_cluster, "%lld slices of W_hh are more than a cluster holds",
                    static_cast<long long>(slices));
    } else if (gpu.clusters[slices] == 0) {
      std::snprintf(why_no_cluster, sizeof why_no_cluster, "this GPU runs no clusters of %d blocks", plan.slices);
    } else {
      plan.groups_at_once = gpu.clusters[slices];
      if (consider(wide)) why = "so few clusters run at once that a grid is faster";
      std::snprintf(why_no_cluster, sizeof why_no_cluster, "%s", why);
    }
  }
  const char* why_no_grid = "W_hh does not fit into the GPU's shared memory and registers";
  if (begin(SequencePlan::grid, SliceWidth::grid, &plan) * shape.D <= gpu.multiprocessors) {
    plan.groups_at_once = gpu.multiprocessors / plan.slices;
    if (!consider(false)) why_no_grid = "the batch or W_hh is too large to keep W_hh on the chip";
  }
  if (best.kind == SequencePlan::cluster && least) {
    std::snprintf(
        best.reason, sizeof best.reason,
        "W_hh stays in the registers and shared memory of %d blocks of a cluster, which write to each other's "
        "shared memory",
        best.slices);
  } else if (least) {
    std::snprintf(best.reason, sizeof best.reason,
                  "W_hh stays on the chip, in %d blocks that exchange their results through L2: %s", best.slices,
                  why_no_cluster);
  } else {
    best.kind = SequencePlan::steps;
    std::snprintf(best.reason, sizeof best.reason, "a product and a fused cell kernel at every step: %s", why_no_grid);
  }
  return best;
}

}  // namespace dlk
