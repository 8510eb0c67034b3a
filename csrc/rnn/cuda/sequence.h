// The recurrent part of a layer on a GPU over whole sequences: the launchers, their parameters, and the plan of a call.
// No CUDA and no torch in here. The caller computes the products outside the recurrence (W_ih x before it; dx and the
// weight gradients after it).
//
// The units of a direction are divided into slices, one per block, and the batch into tiles of sequences that are
// independent of each other. The blocks of one tile and direction are a group: at every step each of them multiplies
// its resident rows of W_hh with the whole vector of every sequence of the tile, applies the cell to its units, and
// sends its part of the next vector to the others. The vector is h in the forward and the gate gradients of the hidden
// side in the backward.
#pragma once

#include "rnn/params.h"

namespace dlk {

constexpr int kSequenceThreads = 256;
constexpr int kSequenceWarps = kSequenceThreads / 32;
constexpr int kMmaColumns = 8;   // sequences in one tensor-core product
constexpr int kMaxCluster = 16;  // blocks
constexpr int kGridBuffers = 8;  // copies of the exchanged vectors in a grid's global memory (group.h)

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int ceil_div(int n, int by) { return (n + by - 1) / by; }

// What one block computes, fixed when the kernel is compiled. A step of a product is 32 terms of 16-bit numbers (two
// tensor-core instructions), or 4 terms in float32.
struct SliceShape {
  int units;
  int rows;            // of the product: gates * units forward, units backward
  int row_groups;      // groups of warps that share out the rows
  int splits;          // parts that the terms are divided into, each with partial sums of its own
  int register_steps;  // steps of a part whose weights stay in registers; the others stay in shared memory
  int step_terms;
};

constexpr SliceShape slice_shape(int gates, bool half, bool cluster, bool backward) {
  SliceShape s{};
  s.units = (gates == 1 ? 32 : 16) * (cluster ? 2 : 1);
  s.rows = backward ? s.units : gates * s.units;
  if (half) {
    // Splitting the rows saves partial sums, splitting the terms saves reading the vectors more than once.
    s.row_groups = s.rows >= 96 ? 2 : 1;
    s.splits = kSequenceWarps / s.row_groups;
    s.register_steps = (cluster && !backward ? 128 : 96) /
                       (s.rows / 16 / s.row_groups * 8);  // a step takes 8 registers for each 16 rows
    s.step_terms = 32;
  } else {
    s.row_groups = 1;
    s.splits = s.rows < 32 ? 2 * kSequenceWarps : kSequenceWarps;  // with 16 rows, half a warp each
    s.register_steps = 64 / (4 * ceil_div(s.rows, 32));
    s.step_terms = 4;
  }
  return s;
}

// Offsets into a block's shared memory, in bytes; each array is followed by `gap` bytes that nothing may access.
struct SharedLayout {
  int terms;   // of the product, with padding
  int stride;  // elements from sequence to sequence in the exchange
  int shared_steps;
  int weights, exchange, partials, states, bias, lengths, receipts;
  int bytes;
};

struct SequencePlan {
  enum Kind : int { cluster, grid, steps } kind;
  int slices;  // blocks in a group
  int tile;    // sequences of a group
  int groups;  // directions times tiles
  int groups_at_once;
  int column_tiles;  // tensor-core products at once: a tile is processed in chunks of 8 * column_tiles sequences
  SharedLayout layout;
  char reason[200];
};

// The limits of a GPU that a plan depends on. The kernels run one block per multiprocessor.
struct GpuLimits {
  int multiprocessors;
  int shared_bytes;             // most shared memory of one block
  int clusters_8, clusters_16;  // how many clusters of 8 and of 16 blocks are resident at once; 0 without clusters
};

// An H200 according to its data sheet. The number of clusters is an estimate (a cluster stays within one of the eight
// groups of 16 or 18 multiprocessors).
constexpr GpuLimits kH200{132, 232448, 16, 8};

SequencePlan sequence_plan(const LayerShape& shape, const GpuLimits& gpu, bool backward, int shared_gap = 0);

// Packed rows are found through `offsets` (the first row of each step, [T + 1], on the
// device), padded rows by strides. All pointers are to device memory.
struct SequenceForward {
  CellKind cell;
  int T, B, H, D;
  int tile;
  SharedLayout layout;
  const int* offsets;                // [T + 1], null = padded
  const int64_t* lengths;            // [B], clamped to 0..T by the kernel; null = T
  RowTensor<const float*> gates[2];  // W_ih x, without biases: features G*H
  const void* w_hh[2];               // [G*H, H]
  const void *b_ih[2], *b_hh[2];     // [G*H] or null
  const void *h0, *c0;               // [D, B, H] or null
  RowTensor<void*> y;                // features D*H
  void *h_n, *c_n;                   // [D, B, H]
  float* saved;                      // [D, rows, R], time-major, or null
  int64_t saved_rows;                // rows of one direction in `saved`
  void* exchange;                    // grid: kGridBuffers * groups * tile * stride elements, need not be initialised
  unsigned* counters;                // grid: [groups], zero
};

struct SequenceBackward {
  CellKind cell;
  int T, B, H, D;
  int tile;
  SharedLayout layout;
  const int* offsets;
  const int64_t* lengths;
  const void* w_hh[2];
  const void *h0, *c0;
  RowTensor<const void*> dy;  // features D*H; data null = zeros
  const float* saved;         // as the forward wrote it
  int64_t saved_rows;
  const void *dh_n, *dc_n;  // [D, B, H] or null
  int64_t bptt_steps;
  RowTensor<void*> dgates[2];  // features gate_grad_slots*H, in the layer's dtype
  float* gate_grads;           // [D, saved_rows, gate_grad_slots, H], time-major: the same in float32, or null
  void *dh0, *dc0;             // [D, B, H] or null
  float* bias_sums;            // [tiles, D, gate_grad_slots, H], each tile's sum over its sequences and steps; or null
  void* exchange;
  unsigned* counters;
};

// Return CUDA's error number, 0 for success. `plan` is of kind cluster or grid. Forward and backward are compiled for
// each dtype in a file of their own.
template <DType dtype>
int launch_sequence(const SequenceForward& params, const SequencePlan& plan, void* stream);
template <DType dtype>
int launch_sequence(const SequenceBackward& params, const SequencePlan& plan, void* stream);

template <class Params>
int launch_sequence(const Params& params, DType dtype, const SequencePlan& plan, void* stream) {
  switch (dtype) {
    case DType::bf16:
      return launch_sequence<DType::bf16>(params, plan, stream);
    case DType::f16:
      return launch_sequence<DType::f16>(params, plan, stream);
    case DType::f32:
      return launch_sequence<DType::f32>(params, plan, stream);
    case DType::f64:
      break;
  }
  return 1;  // cudaErrorInvalidValue: float64 has no kernels
}

}  // namespace dlk
