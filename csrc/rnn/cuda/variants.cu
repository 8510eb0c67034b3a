// Launchers of the kernels of variants.h.
#include "types.h"
#include "variant_backward.h"
#include "variant_forward.h"

namespace dlk {
namespace gpu {
namespace {

template <class Run>
int with_variant_cell(CellKind cell, const Run& run) {
  return cell == CellKind::lstm ? run(LstmCell()) : cell == CellKind::gru ? run(GruCell()) : kInvalidValue;
}

// One block for each row.
LaunchShape block_per_row(int B, int H) {
  LaunchShape shape;
  shape.grid_x = static_cast<unsigned>(B);
  const int threads = (H + 31) / 32 * 32;
  shape.threads = static_cast<unsigned>(threads < kVariantThreads ? threads : kVariantThreads);
  shape.shared_bytes = BlockSums::bytes(static_cast<int>(shape.threads));
  return shape;
}

unsigned blocks(int64_t n, int each) { return static_cast<unsigned>((n + each - 1) / each); }

}  // namespace
}  // namespace gpu

int launch_variant_cell(const VariantCellForward& params, DType dtype, void* stream) {
  return gpu::with_variant_cell(params.cell, [&](auto cell) {
    return gpu::with_item(dtype, [&](auto item) {
      return launch(&gpu::variant_cell_forward<decltype(cell), decltype(item)>, gpu::block_per_row(params.B, params.H),
                    stream, params);
    });
  });
}

int launch_variant_cell(const VariantCellBackward& params, DType dtype, void* stream) {
  return gpu::with_variant_cell(params.cell, [&](auto cell) {
    return gpu::with_item(dtype, [&](auto item) {
      return launch(&gpu::variant_cell_backward<decltype(cell), decltype(item)>, gpu::block_per_row(params.B, params.H),
                    stream, params);
    });
  });
}

int launch_variant_sums(const VariantSums& params, void* stream) {
  // store_number() has no other dtypes.
  for (const DType dtype : {params.of_weights, params.normalised ? params.gains.dtype : DType::f32}) {
    if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16) return gpu::kInvalidValue;
  }
  return gpu::with_variant_cell(params.cell, [&](auto cell) {
    using Cell = decltype(cell);
    LaunchShape shape;
    shape.grid_x = gpu::blocks(int64_t{kVariantGrads<Cell>} * params.H, gpu::kSumColumns);
    shape.grid_y = static_cast<unsigned>(variant_segments(params.rows));
    shape.threads = gpu::kSumColumns * gpu::kSumRows;
    shape.shared_bytes = static_cast<int>(shape.threads * kVariantSums * sizeof(float));
    if (const int error = launch(&gpu::variant_sums<Cell>, shape, stream, params)) return error;
    LaunchShape last;
    last.grid_x = gpu::blocks(int64_t{Cell::kGates} * params.H, gpu::kCellThreads);
    last.threads = gpu::kCellThreads;
    return launch(&gpu::variant_results<Cell>, last, stream, params);
  });
}

}  // namespace dlk
