// Moving rows about on a GPU, for the products around the recurrence. No CUDA and no torch in here.
#pragma once

#include "rnn/params.h"

namespace dlk {

// to(t, b) = from(t, b) of padded input; rows that are not alive become 0, so that what the padding holds reaches no
// product.
struct CopyRows {
  int T, B;
  int64_t features, item_bytes;
  const int64_t* lengths;  // [B], clamped; null = T
  RowTensor<const void*> from;
  RowTensor<void*> to;
};

int launch_copy_rows(const CopyRows& params, void* stream);

// to(t, b) = h before step t of one direction, from what the forward saved: the other factor of W_hh's gradient. Rows
// that are not alive become 0.
struct HiddenBefore {
  CellKind cell;
  int T, B, H;
  const int* offsets;      // [T + 1], null = padded
  const int64_t* lengths;  // [B], clamped; null = T
  bool reverse;            // time runs from the end
  const float* saved;      // [rows, R], time-major
  const void* h0;          // [B, H] in the layer's dtype: before a sequence's first step; null = zeros
  RowTensor<void*> to;     // features H, in the layer's dtype
};

int launch_hidden_before(const HiddenBefore& params, DType dtype, void* stream);

// to = a + b, [count]; either may be null for zeros.
struct AddStates {
  int64_t count;
  const float *a, *b;
  void* to;
};

int launch_add_states(const AddStates& params, DType dtype, void* stream);

// The first row of each step and behind them the number of all, [T + 1], from the host's batch sizes. They travel as
// arguments of kernels, which a CUDA graph keeps: no copy from host memory that may be gone at its replay.
int launch_offsets(const int64_t* batch_sizes, int64_t T, int* offsets, void* stream);

}  // namespace dlk
