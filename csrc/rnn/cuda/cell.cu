// Launchers of the cell kernels.
#include "cell_kernels.h"
#include "types.h"

namespace dlk {
namespace gpu {
namespace {

// Whether rows can be read and written four items at a time.
template <class Pointer>
bool in_fours(const StateRows<Pointer>& rows) {
  return !rows.data || (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % 4 == 0);
}
bool in_fours(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool in_fours(const CellForward& p) {
  return p.H % 4 == 0 && in_fours(p.gates_x) && in_fours(p.gates_h) && in_fours(p.b_ih) && in_fours(p.b_hh) &&
         in_fours(p.state) && in_fours(p.new_state) && in_fours(p.h) && in_fours(p.y) && in_fours(p.c_n) &&
         in_fours(p.cells) && in_fours(p.saved);
}
bool in_fours(const CellBackward& p) {
  return p.H % 4 == 0 && in_fours(p.saved) && in_fours(p.state) && in_fours(p.first) && in_fours(p.dy) &&
         in_fours(p.product) && in_fours(p.carry) && in_fours(p.dc) && in_fours(p.dcells) && in_fours(p.new_dc) &&
         in_fours(p.dgates) && in_fours(p.gate_grads) && in_fours(p.hidden);
}

unsigned blocks(int n, int each) { return static_cast<unsigned>(ceil_div(n, each)); }

template <class Cell, class S, int kWidth>
int start(const CellForward& p, void* stream) {
  LaunchShape shape;
  shape.grid_x = blocks(p.B, kRowThreads);
  shape.grid_y = blocks(p.H, kUnitThreads * kWidth);
  shape.threads = kCellThreads;
  return launch(&cell_forward<Cell, S, kWidth>, shape, stream, p);
}

template <class Cell, class S, int kWidth>
int start(const CellBackward& p, void* stream) {
  LaunchShape shape;
  shape.grid_x = blocks(p.B, kSegmentRows);
  shape.grid_y = blocks(p.H, kUnitThreads * kWidth);
  shape.threads = kCellThreads;
  shape.shared_bytes = p.bias_sums ? kCellThreads * Cell::kGateGrads * kWidth * 4 : 0;
  return launch(&cell_backward<Cell, S, kWidth>, shape, stream, p);
}

template <class Params>
int start_any(const Params& p, DType dtype, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_item(dtype, [&](auto item) {
      using Cell = decltype(cell);
      using S = decltype(item);
      return in_fours(p) ? start<Cell, S, 4>(p, stream) : start<Cell, S, 1>(p, stream);
    });
  });
}

}  // namespace
}  // namespace gpu

int launch_cell(const CellForward& params, DType dtype, void* stream) { return gpu::start_any(params, dtype, stream); }

int launch_cell(const CellBackward& params, DType dtype, void* stream) { return gpu::start_any(params, dtype, stream); }

int launch_initial_resets(const InitialResets& params, DType dtype, void* stream) {
  return gpu::with_item(dtype, [&](auto item) {
    LaunchShape shape;
    shape.grid_x = gpu::blocks(params.B, gpu::kRowThreads);
    shape.grid_y = gpu::blocks(params.H, gpu::kUnitThreads);
    shape.threads = gpu::kCellThreads;
    return launch(&gpu::initial_resets<decltype(item)>, shape, stream, params);
  });
}

int launch_bias_sums(const BiasSums& params, DType dtype, void* stream) {
  return gpu::with_cell(params.cell, [&](auto cell) {
    return gpu::with_item(dtype, [&](auto item) {
      using Cell = decltype(cell);
      using S = decltype(item);
      LaunchShape shape;
      shape.grid_x = gpu::blocks(Cell::kGates * params.H, gpu::kCellThreads);
      shape.threads = gpu::kCellThreads;
      return launch(&gpu::add_bias_sums<Cell, S>, shape, stream, params);
    });
  });
}

}  // namespace dlk
