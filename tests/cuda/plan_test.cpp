// Tests the plans of sequence_plan() on GPUs other than an H200, and the memory that every plan promises its kernel.
// tests/rnn/test_cuda_plan.py tests the plans for an H200.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "rnn/cuda/sequence.h"

namespace dlk {
namespace {

constexpr CellKind kCells[] = {CellKind::lstm, CellKind::gru, CellKind::rnn_tanh};
const char* const kKinds[] = {"cluster", "grid", "steps"};

LayerShape layer(CellKind cell, DType dtype, int64_t B, int64_t H, int D) {
  return {cell, dtype, 100, B, H, H, 0, D, 100 * B, false, Weights::given, false};
}

void require(bool holds, const char* what, const LayerShape& shape, bool backward, const SequencePlan& plan) {
  if (holds) return;
  std::printf(
      "%s: %s, %d bytes a number, B %lld, H %lld, D %d, %s: %s of %d slices of %d units, tile %d, columns %d, "
      "groups %d of %d, %d bytes: %s\n",
      what, mode_name(shape.cell), shape.dtype == DType::f32 ? 4 : 2, static_cast<long long>(shape.B),
      static_cast<long long>(shape.H), shape.D, backward ? "backward" : "forward", kKinds[plan.kind], plan.slices,
      plan.units, plan.tile, plan.columns, plan.groups, plan.groups_at_once, plan.layout.bytes, plan.reason);
  std::exit(1);
}

// A GPU may run clusters of some sizes only. A layer that needs another size runs as a grid, and the plan says why.
void only_cluster_sizes_that_run() {
  for (int n = 1; n <= kMaxCluster; ++n) {
    GpuLimits gpu = kH200;
    gpu.clusters[n] = 0;
    for (CellKind cell : kCells) {
      for (bool backward : {false, true}) {
        // In float32 there are no wide slices, which would need clusters of fewer blocks.
        const LayerShape shape = layer(cell, DType::f32, 1, n * slice_units(gate_count(cell), SliceWidth::cluster), 1);
        const SequencePlan usual = sequence_plan(shape, kH200, backward), plan = sequence_plan(shape, gpu, backward);
        require(usual.kind == SequencePlan::cluster && usual.slices == n, "not a cluster", shape, backward, usual);
        require(usual.groups_at_once == kH200.clusters[n], "other clusters", shape, backward, usual);
        require(plan.kind == SequencePlan::grid, "not a grid", shape, backward, plan);
        char why[80];
        std::snprintf(why, sizeof why, "this GPU runs no clusters of %d blocks", n);
        require(std::strstr(plan.reason, why) != nullptr, "another reason", shape, backward, plan);
      }
    }
  }
}

// If few clusters run at once and the batch is large, the grid's slower barrier costs less than waves of clusters.
void a_grid_instead_of_many_waves() {
  GpuLimits gpu = kH200;
  gpu.clusters[16] = 2;
  const LayerShape shape = layer(CellKind::lstm, DType::f32, 8, 512, 1);
  const SequencePlan plan = sequence_plan(shape, gpu, false);
  require(plan.kind == SequencePlan::grid && std::strstr(plan.reason, "a grid is faster"), "not a grid", shape, false,
          plan);
}

void memory_of_every_plan(const GpuLimits& gpu) {
  for (CellKind cell : kCells) {
    for (DType dtype : {DType::f32, DType::bf16}) {
      for (int H : {1, 8, 33, 64, 100, 200, 333, 512, 600, 640, 700, 768, 1000, 1024, 1500, 2048, 2112}) {
        for (int B : {1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 100, 256, 1000}) {
          for (int D : {1, 2}) {
            for (bool backward : {false, true}) {
              const LayerShape shape = layer(cell, dtype, B, H, D);
              const SequencePlan plan = sequence_plan(shape, gpu, backward);
              if (plan.kind == SequencePlan::steps) continue;
              const auto need = [&](bool holds, const char* what) { require(holds, what, shape, backward, plan); };
              const bool half = dtype != DType::f32;
              const SliceShape slice = slice_shape(gate_count(cell), half, plan.units, backward);
              const SharedLayout& l = plan.layout;
              need(plan.slices * plan.units >= H && (plan.slices - 1) * plan.units < H, "slices");
              need(plan.tile > 0 && plan.tile % plan.columns == 0, "chunks");
              need(half ? plan.columns == 8 || plan.columns == 16 : plan.columns <= 8, "columns");
              need(plan.groups == D * ((B + plan.tile - 1) / plan.tile), "groups");
              need(plan.kind != SequencePlan::grid || plan.groups * plan.slices <= gpu.multiprocessors, "residence");
              need(plan.kind != SequencePlan::cluster || plan.groups_at_once == gpu.clusters[plan.slices], "clusters");
              need(l.bytes <= gpu.shared_bytes, "shared memory");
              need(l.terms >= H * (backward ? gate_count(cell) : 1), "terms");
              const int steps = l.terms / slice.step_terms;
              need((slice.register_steps + l.shared_steps) * slice.splits >= steps, "steps");
              const int items = l.shared_steps * slice.splits * slice.step_terms * slice.rows;
              need(l.exchange - l.weights >= items * (half ? 2 : 4), "weights");
              // What the kernels write there: two sets of partial sums, and at the end of the backward a sum for every
              // thread and slot of the gate gradients.
              const int floats = (l.states - l.partials) / 4;
              need(floats >= 2 * slice.splits * plan.columns * (slice.rows + 4), "partial sums");
              need(!backward || floats >= gate_grad_slots(cell) * kSequenceThreads, "bias sums");
              need((l.bytes - l.lengths) / 4 >= plan.tile + plan.tile / plan.columns, "lengths");
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace dlk

int main() {
  dlk::only_cluster_sizes_that_run();
  dlk::a_grid_instead_of_many_waves();
  dlk::memory_of_every_plan(dlk::kH200);
  dlk::GpuLimits small = dlk::gpu_of_groups(60, 101376, 3);
  dlk::memory_of_every_plan(small);
  for (int& n : small.clusters) n = 0;
  dlk::memory_of_every_plan(small);
  std::printf("all plans hold\n");
}
