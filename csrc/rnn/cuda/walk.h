// Device functions for the lengths of a block's sequences and the places of their rows.
#pragma once

#include "real.h"
#include "sequence.h"

namespace dlk {
namespace gpu {

// Element offset of row (t, b).
template <class Pointer>
DLK_DEVICE int64_t row_offset(const RowTensor<Pointer>& tensor, const int* offsets, int t, int b) {
  return offsets ? (static_cast<int64_t>(offsets[t]) + b) * tensor.t : t * tensor.t + b * tensor.b;
}

DLK_DEVICE int64_t row_number(const int* offsets, int B, int t, int b) {
  return offsets ? static_cast<int64_t>(offsets[t]) + b : static_cast<int64_t>(t) * B + b;
}

// Number of steps of sequence b, 0 past the end of the batch. For packed input it is found by a binary search, because
// the number of sequences never increases from step to step.
DLK_DEVICE int sequence_length(const int* offsets, const int64_t* lengths, int T, int B, int b) {
  if (b >= B) return 0;
  if (lengths) return lengths[b] < 0 ? 0 : lengths[b] > T ? T : static_cast<int>(lengths[b]);
  if (!offsets) return T;
  int begin = 0, end = T;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (offsets[middle + 1] - offsets[middle] > b) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Whether direction d takes step t of sequence b, which has `length` steps, with a state of zeros. A flag at a step
// separates it from the step before it in time, so direction 1 finds the flag of step t at the step after it in time.
// Flags in the padding have no effect.
DLK_DEVICE bool is_reset(const uint8_t* resets, const int* offsets, int B, int d, int t, int b, int length) {
  const int flagged = d == 0 ? t : t + 1;
  return resets && flagged < length && resets[row_number(offsets, B, flagged, b)];
}

// Fills `lengths` (shared memory) with the lengths of the tile, followed by the largest of each chunk of sequences;
// returns the largest of all. Synchronises the threads of the block.
template <int kColumns, class Params>
DLK_DEVICE int read_lengths(const Params& p, int first, int* lengths) {
  for (int i = static_cast<int>(threadIdx.x); i < p.tile; i += kSequenceThreads) {
    lengths[i] = sequence_length(p.offsets, p.lengths, p.T, p.B, first + i);
  }
  __syncthreads();
  int longest = 0;
  for (int chunk = 0; chunk < p.tile; chunk += kColumns) {
    int here = 0;
    for (int i = chunk; i < chunk + kColumns; ++i) here = lengths[i] > here ? lengths[i] : here;
    if (threadIdx.x == 0) lengths[p.tile + chunk / kColumns] = here;
    longest = here > longest ? here : longest;
  }
  __syncthreads();
  return longest;
}

DLK_DEVICE void forbid_gaps(const SharedLayout& layout, char* shared) {
  if constexpr (kSharedGap > 0) {
    const int ends[] = {layout.exchange, layout.partials, layout.states, layout.bias,
                        layout.lengths,  layout.receipts, layout.bytes};
    for (int end : ends) forbid_gap(shared + end - kSharedGap);
  }
}

template <class S>
DLK_DEVICE float load_or_zero(const void* data, int64_t index) {
  return data ? to_float(static_cast<const S*>(data)[index]) : 0.0f;
}

template <class S>
DLK_DEVICE void store_if(void* data, int64_t index, float value) {
  if (data) static_cast<S*>(data)[index] = from_float<S>(value);
}

// The sum of all parts of a product for one element.
template <int kSplits>
DLK_DEVICE float add_parts(const float* part, int distance) {
  float sum = part[0];
  DLK_UNROLL
  for (int i = 1; i < kSplits; ++i) sum += part[i * distance];
  return sum;
}

}  // namespace gpu
}  // namespace dlk
