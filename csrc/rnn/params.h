// What one call of a recurrent layer means, in plain structs: no torch, no Python.
//
// Layouts. T steps, B sequences, I input features, H hidden units, P projected
// units (0 = no projection), O = P ? P : H outputs per direction, D directions
// (1 or 2), G gates of W (lstm 4, gru 3, rnn 1), S saved slots (lstm 5, gru 5,
// rnn 1), R values in a saved record, S * H + P of them if all slots are there and none has 16 bits. "Row" is one (t,
// b) pair: t * B + b for padded input, its position in PackedSequence.data for packed input. All strides count
// elements.
//
// The compute type is double for f64 and float for every other dtype. Each tensor has a
// dtype of its own: under autocast input, weights and states differ. All of them are f64
// or none is. LayerShape::dtype is what products may be rounded to.
#pragma once

#include "core/types.h"
#include "rnn/cells/traits.h"

namespace dlk {

struct LayerShape {
  CellKind cell;
  DType dtype;
  int64_t T, B, I, H, P;
  int D;
  int64_t rows;     // T * B when padded, the sum of the lengths when packed
  bool narrow;      // a record's bounded and narrow slots have 16 bits; `dtype` has 16 bits
  Weights weights;  // of `packed`: fewer bits only in calls of float32 that save nothing
  bool one_step;    // the call of a cell: its records have no state slot where the backward can do without
  int64_t outputs() const { return P ? P : H; }
  bool keeps_state() const { return !one_step || !cell_traits(cell).state_follows; }
  // The slots of a record that have 16 bits.
  int half_slots() const {
    const CellTraits traits = cell_traits(cell);
    return narrow ? traits.bounded + traits.narrow - (traits.narrow && !keeps_state()) : 0;
  }
  int64_t record() const {
    const int slots = saved_slots(cell) - !keeps_state(), halves = half_slots();
    return (slots - halves) * H + (halves * H + 1) / 2 + P;
  }
};

// Contiguous; the biases are both given or both null, w_hr is null without projection.
struct DirectionWeights {
  DType dtype;
  const void* w_ih;  // [G*H, I]
  const void* w_hh;  // [G*H, O]
  const void* b_ih;  // [G*H]
  const void* b_hh;  // [G*H]
  const void* w_hr;  // [P, H]
};

// A [T, B, F] tensor with contiguous last dimension, or packed [rows, F]
// (then `t` is the stride from row to row and `b` is not read).
template <class Pointer>
struct RowTensor {
  Pointer data;
  int64_t t, b;
  DType dtype;
};

// A contiguous [D, B, F] tensor.
template <class Pointer>
struct StateTensor {
  Pointer data;
  DType dtype;
  explicit operator bool() const { return data != nullptr; }
};

struct ForwardParams {
  LayerShape shape;
  RowTensor<const void*> x;     // features: I
  StateTensor<const void*> h0;  // [D, B, O], null = zeros
  StateTensor<const void*> c0;  // [D, B, H], null = zeros; lstm only
  DirectionWeights weights[2];
  const void* packed;          // what rnn_pack() wrote for these weights, or null
  const int64_t* batch_sizes;  // [T], descending: x, y are packed; else null
  const int64_t* lengths;      // [B], in 0..T, already checked; else null
  const uint8_t* resets;       // [rows], 0 or 1, or null: see SequenceLayout
  RowTensor<void*> y;          // features: D*O; padding rows are written as 0
  RowTensor<void*> cells;      // features: D*H, c of every step, lstm only; data null = not wanted; padding as in y
  StateTensor<void*> h_n;      // [D, B, O]
  StateTensor<void*> c_n;      // [D, B, H], lstm only
  void* saved;                 // [D, rows, R] of the compute type, or null (inference): slots of H, then h' if it is
                               // projected. lstm i,f,g,o,c'; gru r,z,n,W_hn h + b_hn,h'; rnn h'. Slots of 16 bits
                               // come first (rnn/cpu/record.h). Padding rows are not written.
  bool deterministic;          // a sequence's result must not depend on the other sequences of its batch
};

struct DirectionGrads {  // shapes and dtypes of the weights; all null when not wanted
  void *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};

struct BackwardParams {
  LayerShape shape;
  RowTensor<const void*> x;
  StateTensor<const void*> h0, c0;
  DirectionWeights weights[2];
  const int64_t *batch_sizes, *lengths;
  const uint8_t* resets;
  const void* saved;                    // what the forward saved; its other results are not needed
  RowTensor<const void*> dy;            // features: D*O; data null = zeros
  RowTensor<const void*> dcells;        // features: D*H; data null = zeros
  StateTensor<const void*> dh_n, dc_n;  // [D, B, O], [D, B, H]; null = zeros
  int64_t bptt_steps;                   // 0 = never cut; else gradients stop at every multiple of it
  RowTensor<void*> dx;                  // data null = not wanted; padding rows are written as 0
  StateTensor<void*> dh0, dc0;          // null = not wanted
  DirectionGrads grads[2];
  void* gate_grads;  // [D, rows, gate_grad_slots, H] of the compute type, or null; padding
                     // rows are written as 0. gru: dr, dz, dn (input half), dn (hidden half)
  void* proj_grads;  // [D, rows, P] of the compute type, or null: the complete gradient of h
  bool deterministic;
};

// How a call ran, or would run; explain() and the tests read it.
struct Plan {
  Isa isa;
  int threads;  // number asked for, at most kMaxMembers
  enum Split : int { serial, rows, units } split;
  enum Recurrence : int { dot, tiles } recurrence;
  // Time steps whose products outside the recurrence are one GEMM; 0: each step multiplies x along with h.
  int64_t chunk_steps;
  bool directions_side_by_side;
  int64_t patience_us;  // how long the first thread waits for the others
};

// The instruction set whose kernels and weight panels a layer uses: only products of bfloat16 have their own.
Isa layer_isa(const LayerShape& shape, Isa isa);
Plan rnn_plan(const LayerShape& shape, Isa isa, int threads, bool backward, bool deterministic, bool packed_weights);

void rnn_forward(const ForwardParams& params, const Runtime& runtime);
void rnn_backward(const BackwardParams& params, const Runtime& runtime);

// Bytes that rnn_pack() writes for all directions, for this ISA. A header in front names ISA,
// cell, dtype and sizes, which rnn_packed_matches() compares with a shape.
// `shape.weights` decides in which form they are kept, and fewer bits take weights of float32.
size_t rnn_packed_bytes(const LayerShape& shape, Isa isa);
void rnn_pack(const LayerShape& shape, const DirectionWeights* weights, Isa isa, void* out);
// The form of the weights that rnn_pack() wrote to `packed`, which rnn_packed_matches() must confirm.
Weights rnn_packed_weights(const void* packed, size_t bytes);
bool rnn_packed_matches(const void* packed, size_t bytes, const LayerShape& shape, Isa isa);

// The last call of this thread: its plan, and how many threads took part.
struct LastRun {
  Plan plan;
  int members;
  bool backward;
};
const LastRun& rnn_last_run();

}  // namespace dlk
