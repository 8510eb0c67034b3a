// Moving rows about on a GPU, for the products around the recurrence. No CUDA and no torch in here.
#pragma once

#include "../rnn_params.h"

namespace dlk {

// to(t, b) = from(t, b), or that of the step before in the direction's own order; rows that are not alive become 0, so
// that what the padding holds reaches no product.
struct CopyRows {
  int T, B;
  int64_t features, item_bytes;
  const int* offsets;      // [T + 1], null = padded
  const int64_t* lengths;  // [B], clamped; null = T
  enum Step : int { same, before, before_reverse } step;
  RowTensor<const void*> from;
  const void* first;  // [B, features]: what lies before a sequence's first step; null = zeros
  RowTensor<void*> to;
};

int launch_copy_rows(const CopyRows& params, void* stream);

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
