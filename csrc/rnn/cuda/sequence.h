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
constexpr int kMaxCluster = 16;  // blocks in a cluster
constexpr int kGridBuffers = 8;  // copies of the exchanged vectors in a grid's global memory (group.h)

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int ceil_div(int n, int by) { return (n + by - 1) / by; }

// What one block computes, fixed when the kernel is compiled. A step of a product is 32 terms of 16-bit numbers (two
// tensor-core instructions), or 4 terms in float32.
struct SliceShape {
  int units;
  int rows;            // of the product: gates * units forward, units backward; padded to whole tensor-core products
  int row_groups;      // groups of warps that share out the rows
  int splits;          // parts that the terms are divided into, each with partial sums of its own
  int register_steps;  // steps of a part whose weights stay in registers; the others stay in shared memory
  int step_terms;
};

// How many units a block may have. A grid has the smallest slices, because it has the most blocks. The wide slices are
// those with which 16 blocks hold the largest 16-bit layers whose slices still fit one block: lstm up to 640 units, gru
// up to 768. There is none for the rnn, whose 16 blocks of 64 units hold as many as its W_hh leaves room for.
enum class SliceWidth : int { grid, cluster, wide_cluster };

constexpr int slice_units(int gates, SliceWidth width) {
  switch (width) {
    case SliceWidth::grid:
      return gates == 1 ? 32 : 16;
    case SliceWidth::cluster:
      return gates == 1 ? 64 : 32;
    case SliceWidth::wide_cluster:
      return gates == 4 ? 40 : gates == 3 ? 48 : 0;
  }
  return 0;
}

constexpr bool is_wide(int gates, int units) { return units == slice_units(gates, SliceWidth::wide_cluster); }

constexpr SliceShape slice_shape(int gates, bool half, int units, bool backward) {
  SliceShape s{};
  s.units = units;
  s.rows = backward ? s.units : gates * s.units;
  if (half) {
    s.rows = round_up(s.rows, 16);
    // Splitting the rows saves partial sums, splitting the terms saves reading the vectors more than once.
    s.row_groups = s.rows >= 96 ? 2 : 1;
    s.splits = kSequenceWarps / s.row_groups;
    // A step takes 8 registers for each 16 rows of a warp. Wide slices have one tensor-core product at a time, which
    // leaves more registers for weights. So does the forward of a cluster, which loads its vectors just before they are
    // used, but not that of the rnn, whose threads have up to four cells.
    const bool wide = is_wide(gates, units), cluster = units == slice_units(gates, SliceWidth::cluster);
    const int registers = wide ? 144 : cluster && gates > 1 && !backward ? 128 : 96;
    s.register_steps = registers / (ceil_div(s.rows / 16, s.row_groups) * 8);
    s.step_terms = 32;
  } else {
    s.row_groups = 1;
    s.splits = s.rows < 32 ? 2 * kSequenceWarps : kSequenceWarps;  // with 16 rows, half a warp each
    s.register_steps = 64 / (4 * ceil_div(s.rows, 32));
    s.step_terms = 4;
  }
  return s;
}

// How the cells of a chunk, kUnits of each of kColumns sequences, are divided among the threads of a block: a thread
// has the same unit at every turn, and its sequences are kApart from turn to turn. If kUnits does not divide the number
// of threads, those from kThreads on have no cells.
template <int kUnits, int kColumns>
struct CellTurns {
  static constexpr int kApart = kSequenceThreads / kUnits, kThreads = kApart * kUnits;
  static constexpr int kCount = ceil_div(kColumns, kApart);
  static constexpr bool kWholeWarps = kThreads % 32 == 0 && kColumns % kApart * kUnits % 32 == 0;
  static constexpr int column(int thread, int turn) { return thread / kUnits + turn * kApart; }
  static constexpr bool has_cell(int thread, int turn) {
    // The first comparison is known to the compiler; it does not know how many threads there are.
    const bool there = (turn + 1) * kApart <= kColumns || column(thread, turn) < kColumns;
    return there && (kThreads == kSequenceThreads || thread < kThreads);
  }
  // The same for all threads of a warp: whether its first thread has a cell, and with it perhaps others.
  static constexpr bool warp_has_cells(int thread, int turn) { return has_cell(thread / 32 * 32, turn); }
};

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
  int units;   // of a slice
  int tile;    // sequences of a group
  int groups;  // directions times tiles
  int groups_at_once;
  int columns;  // sequences that are multiplied at once: a tile is processed in chunks of this many
  SharedLayout layout;
  char reason[200];
};

// The limits of a GPU that a plan depends on. The kernels run one block per multiprocessor.
struct GpuLimits {
  int multiprocessors;
  int shared_bytes;               // most shared memory of one block
  int clusters[kMaxCluster + 1];  // [n]: how many clusters of n blocks are resident at once; 0: none can be launched
  bool has_clusters() const {
    for (int n : clusters) {
      if (n > 0) return true;
    }
    return false;
  }
};

// A GPU on which a cluster stays within one of some groups of 16 multiprocessors.
constexpr GpuLimits gpu_of_groups(int multiprocessors, int shared_bytes, int groups) {
  GpuLimits limits{multiprocessors, shared_bytes, {}};
  for (int n = 1; n <= kMaxCluster; ++n) limits.clusters[n] = groups * (16 / n);
  return limits;
}

// An H200 according to its data sheet. The numbers of clusters are estimates: a few of its eight groups have 18
// multiprocessors.
constexpr GpuLimits kH200 = gpu_of_groups(132, 232448, 8);

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
  const uint8_t* resets;             // [rows], time-major, 0 or 1; null = none (is_reset() in walk.h)
  RowTensor<const float*> gates[2];  // W_ih x, without biases: features G*H
  const void* w_hh[2];               // [G*H, H]
  const void *b_ih[2], *b_hh[2];     // [G*H] or null
  const void *h0, *c0;               // [D, B, H] or null
  RowTensor<void*> y;                // features D*H
  void* cells;                       // c of every step with the strides of y, lstm only; null = not wanted
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
  const uint8_t* resets;
  const void* w_hh[2];
  const void *h0, *c0;
  RowTensor<const void*> dy;      // features D*H; data null = zeros
  RowTensor<const void*> dcells;  // features D*H, gradient of c of every step, lstm only; data null = zeros
  const float* saved;             // as the forward wrote it
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
