// Moves rows on a GPU, for the products before and after the recurrence. No CUDA and no torch in here.
#pragma once

#include "rnn/params.h"

namespace dlk {

// to(t, b) = from(t, b) of padded input. Rows that are not alive become 0, so that the values in the padding do not
// reach the products.
struct CopyRows {
  int T, B;
  int64_t features, item_bytes;
  const int64_t* lengths;  // [B], clamped to 0..T by the kernel; null = T
  RowTensor<const void*> from;
  RowTensor<void*> to;
};

int launch_copy_rows(const CopyRows& params, void* stream);

// to(t, b) = h before step t of one direction, from what the forward saved: the other factor of W_hh's gradient. Rows
// that are not alive become 0, and so do those whose step is reset.
struct HiddenBefore {
  CellKind cell;
  int T, B, H;
  const int* offsets;      // [T + 1], null = padded
  const int64_t* lengths;  // [B], clamped to 0..T by the kernel; null = T
  const uint8_t* resets;   // [rows], time-major; null = none
  bool reverse;            // time runs from the end
  const float* saved;      // [rows, R], time-major
  const void* h0;          // [B, H] in the layer's dtype: before a sequence's first step; null = zeros
  RowTensor<void*> to;     // features H, in the layer's dtype
  // Of layers with layer normalisation, zoneout or recurrent dropout, whose records hold h':
  int64_t record = 0;              // floats in a record; 0 = the record of a plain layer, from which h' is computed
  int64_t h = 0;                   // where h' begins in it
  const float* dropout = nullptr;  // [B, H]: multiplies the h before the step; null = ones
};

int launch_hidden_before(const HiddenBefore& params, DType dtype, void* stream);

// to = a + b * times, [count]; a or b may be null for zeros, and times for ones.
struct AddStates {
  int64_t count;
  const float *a, *b;
  void* to;
  const float* times = nullptr;
};

int launch_add_states(const AddStates& params, DType dtype, void* stream);

// Writes the first row of each step and then the number of all rows, [T + 1], from batch sizes on the host. The values
// are passed as arguments of kernels, which a CUDA graph keeps: a copy from host memory might read freed memory when
// the graph is replayed.
int launch_offsets(const int64_t* batch_sizes, int64_t T, int* offsets, void* stream);

}  // namespace dlk
