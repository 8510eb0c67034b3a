// Maps the run-time cell and dtype of a call to the types that the kernels are compiled for.
#pragma once

#include "real.h"
#include "rnn/params.h"

namespace dlk {
namespace gpu {

constexpr int kInvalidValue = 1;  // CUDA's cudaErrorInvalidValue

// Calls `run(Cell())`. tanh and relu share one type and differ by a flag.
template <class Run>
int with_cell(CellKind cell, const Run& run) {
  switch (cell) {
    case CellKind::lstm:
      return run(LstmCell());
    case CellKind::gru:
      return run(GruCell());
    case CellKind::rnn_tanh:
    case CellKind::rnn_relu:
      return run(RnnCell());
  }
  return kInvalidValue;
}

// Calls `run(S())`. There are no kernels for float64.
template <class Run>
int with_item(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(float());
    case DType::bf16:
      return run(bf16_t());
    case DType::f16:
      return run(f16_t());
    case DType::f64:
      break;
  }
  return kInvalidValue;
}

}  // namespace gpu
}  // namespace dlk
