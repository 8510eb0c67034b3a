// One step of an lstm or gru layer with layer normalisation, zoneout or recurrent dropout on a GPU, and the sums over
// all rows after the backward: the launchers and their parameters, each of one direction. The caller computes the
// products before and after a step. No CUDA and no torch in here.
#pragma once

#include "cell.h"
#include "rnn/variants.h"

namespace dlk {

// How the steps of one direction differ from plain ones. All numbers are float32, in whichever dtype the caller has
// them.
struct StepVariant {
  bool normalised;
  float eps, zoneout_c, zoneout_h;  // the rates count where there is no mask
  const float *b_ih, *b_hh;         // [G*H], or both null
  Gains<const float*> gains;
  const float* dropout;  // [B, H]: multiplies h where it enters W_hh h; null = ones
};

// What the forward saves of a row: variant_record values of float32. lstm: i, f, g, o, c' before zoneout, c' after it,
// h'; gru: r, z, n, W_hn h + b_hn after normalisation, h'; [H] each. With layer normalisation the normalised W_ih x and
// W_hh h follow, [G*H] each, and kMoments numbers.
template <class Cell>
struct VariantRecord {
  static constexpr int kZonedC = Cell::kStateSlot + 1;                          // lstm: c' after zoneout
  static constexpr int kH = Cell::kCellState ? kZonedC + 1 : Cell::kStateSlot;  // h'
  static constexpr int kSlots = kH + 1;

  constexpr VariantRecord(int64_t H, bool normalised)
      : size(kSlots * H + (normalised ? 2 * Cell::kGates * H + kMoments : 0)), H(H) {}
  const int64_t size, H;
  // The first value of a slot, of the normalised products, and of the moments.
  constexpr int64_t slot(int k) const { return k * H; }
  constexpr int64_t input() const { return kSlots * H; }
  constexpr int64_t hidden() const { return input() + Cell::kGates * H; }
  constexpr int64_t moments() const { return hidden() + Cell::kGates * H; }
};

constexpr int64_t variant_record(CellKind cell, int64_t H, bool normalised) {
  return cell_traits(cell).cell_state ? VariantRecord<CellConstants<CellKind::lstm>>(H, normalised).size
                                      : VariantRecord<CellConstants<CellKind::gru>>(H, normalised).size;
}

struct VariantCellForward {
  CellKind cell;
  int B, H;
  StepRows rows;  // without resets
  StepVariant variant;
  const uint8_t *mask_c, *mask_h;   // bools [B, H] of this step, or null
  StateRows<const float*> gates_x;  // W_ih x, without biases, G*H a row
  float* gates_h;                   // [B, G*H], W_hh h, without biases. The kernel overwrites it
  float *h, *c;                     // [B, H]: the states before the step, which become those after it; c of the lstm
  void *h_n, *c_n;                  // [B, H] in the layer's dtype: receive the states after the step
  void* operand;                    // [B, H] in the layer's dtype: receives h' times the dropout; null = not wanted
  StateRows<void*> y;               // receives h', and 0 in rows that are not alive
  StateRows<float*> saved;          // receives the records (VariantRecord), or absent
};

// Values of H in what the backward computes of a row in float32: the gradients of the gates, gate_grad_slots, and for
// the lstm that of the c' that h' reads, which is the normalised c' times its gain plus its bias.
constexpr int variant_grads(CellKind cell) { return gate_grad_slots(cell) + cell_traits(cell).cell_state; }
template <class Cell>
constexpr int kVariantGrads = Cell::kGateGrads + Cell::kCellState;

struct VariantCellBackward {
  CellKind cell;
  int B, H;
  StepRows rows;
  StepVariant variant;
  int64_t bptt_steps;
  const uint8_t *mask_c, *mask_h;
  StateRows<const float*> saved, before;  // the records of this step and of the step before; that may be absent
  const void *h0, *c0;                    // [B, H] in the layer's dtype, before a sequence's first step; null = zeros
  StateRows<const void*> dy;              // gradient of the step's output, or absent
  const float* product;                   // [B, H]: `hidden` of the next step times W_hh; null = zeros
  float *dh, *dc;  // [B, H]: gradients of h' and c' from the next step, of h' without what comes through `product`.
                   // They become those for the step before
  StateRows<float*> grads;     // receives variant_grads values of H a row
  StateRows<void*> of_input;   // receives the gradients of W_ih x, G*H a row, in the layer's dtype
  StateRows<void*> of_hidden;  // those of W_hh h; absent = they are the same. Both: 0 in padded rows not alive
  void* hidden;                // [B, G*H] in the layer's dtype: those of W_hh h, 0 at a cut and in rows not alive
};

// The gradients of biases and gains, sums over the rows of all steps.
struct VariantSums {
  CellKind cell;
  int T, B, H;
  int64_t rows;
  bool normalised;
  const int64_t* lengths;  // [B], clamped to 0..T by the kernel; null = all rows are alive
  const float* grads;      // [rows, variant_grads * H], time-major, not read in rows that are not alive
  const float* saved;      // [rows, R], the same
  float* partial;          // [variant_segments(rows), kVariantSums, variant_grads * H]
  DType of_weights;
  void *b_ih, *b_hh;   // [G*H]; null = not wanted
  Gains<void*> gains;  // null without layer normalisation
};

// The rows are summed in segments. Each column of `grads` has three sums: of its values, of these times the normalised
// values of the input side (for the column of c' times the normalised c'), and of these times those of the hidden side.
constexpr int kVariantSums = 3;
constexpr int variant_segments(int64_t rows) { return rows < 64 * 64 ? static_cast<int>((rows + 63) / 64) : 64; }

// Return CUDA's error number, 0 for success.
int launch_variant_cell(const VariantCellForward& params, DType dtype, void* stream);
int launch_variant_cell(const VariantCellBackward& params, DType dtype, void* stream);
int launch_variant_sums(const VariantSums& params, void* stream);

}  // namespace dlk
