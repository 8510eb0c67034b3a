// One step of a recurrent layer on a GPU: the launchers and their parameters. The caller computes the products before
// and after the step. It serves the cells, and layers whose W_hh is too large to stay on the chip. No CUDA and no
// torch in here.
#pragma once

#include "rnn/params.h"

namespace dlk {

// A [B, H] matrix with `stride` elements from row to row, in float32 or in the layer's dtype.
template <class Pointer>
struct StateRows {
  Pointer data;
  int64_t stride;
  bool f32;
};

// Which rows take part in a step of a layer. A cell has one step, in which all rows take part.
struct StepRows {
  int t, T;
  const int* offsets;      // first packed row of each step, [T + 1], null = padded; packed rows are all alive
  const int64_t* lengths;  // [B], clamped to 0..T by the kernel; null = T
  bool reverse;            // time runs from the end
  const uint8_t* resets;   // [rows], time-major; null = none
};

// If the next step of a row is reset, new_state and h receive 0 instead of the state.
struct CellForward {
  CellKind cell;
  int B, H;
  StepRows rows;
  StateRows<const float*> gates_x;  // W_ih x, without biases, G*H a row
  StateRows<const float*> gates_h;  // W_hh h, without biases, G*H a row
  const void *b_ih, *b_hh;          // [G*H] in the layer's dtype, or null
  StateRows<const void*> state;     // c (lstm) or h (gru) before the step; data null = zeros
  StateRows<void*> new_state;       // the same after it; may be `state`; data null = not wanted
  StateRows<void*> h, y;            // both receive h', either may be absent; rows not alive: y is 0, h is not written
  StateRows<void*> c_n, cells;      // receive c' too, or absent; rows not alive: cells is 0, c_n is not written
  StateRows<float*> saved;          // R a row, or absent
};

struct CellBackward {
  CellKind cell;
  int B, H;
  StepRows rows;
  int64_t bptt_steps;
  StateRows<const float*> saved;    // R a row
  StateRows<const void*> state;     // c (lstm) or h (gru) before the step; the rnn needs none
  StateRows<const void*> first;     // the same before a sequence's first step; data null = zeros
  StateRows<const void*> dy;        // gradient of the step's output, or absent
  StateRows<const float*> product;  // dgates(next) W_hh, or absent
  StateRows<float*> carry;          // rest of dh from the next step; receives that for the step before; or absent
  StateRows<const void*> dc;        // gradient of c', or absent
  StateRows<const void*> dcells;    // another gradient of c', or absent; the two are added
  StateRows<void*> new_dc;          // gradient of c; may be `dc`; or absent
  StateRows<void*> dgates;          // gate_grad_slots*H a row, in the layer's dtype; 0 in rows that are not alive
  StateRows<float*> gate_grads;     // the same in float32, or absent
  StateRows<void*> hidden;          // those of the hidden side for the step before, 0 at a cut, G*H a row, or absent
  float* bias_sums;                 // [gate_grad_slots, H] for each segment, or null
  int64_t segment_stride;           // floats from segment to segment
  bool add_to_bias_sums;
};

// Rows whose bias gradients one block of the backward sums, a segment. There are ceil(B / kSegmentRows) segments.
constexpr int kSegmentRows = 64;

// Sums `segments` blocks of [gate_grad_slots, H], `stride` floats apart, in order, into the gradients of the biases.
struct BiasSums {
  CellKind cell;
  int H, segments;
  int64_t stride;
  const float* sums;
  void *b_ih, *b_hh;  // [G*H]
};

// Sets the states of the sequences whose step is reset to 0: h [B, H] in the layer's dtype, and `state` [B, H] unless
// it is null.
struct InitialResets {
  int B, H;
  StepRows rows;
  void* h;
  float* state;
};

// Return CUDA's error number, 0 for success.
int launch_cell(const CellForward& params, DType dtype, void* stream);
int launch_cell(const CellBackward& params, DType dtype, void* stream);
int launch_initial_resets(const InitialResets& params, DType dtype, void* stream);
int launch_bias_sums(const BiasSums& params, DType dtype, void* stream);

}  // namespace dlk
