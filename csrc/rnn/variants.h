// What layer normalisation, zoneout and recurrent dropout add to a call of an lstm or gru layer (rnn/params.h has the
// layouts and the letters). The layer has no projection.
#pragma once

#include "rnn/params.h"

namespace dlk {

// Contiguous parameters of layer normalisation; all null without it, and c and c_bias for the gru.
template <class Pointer>
struct Gains {
  DType dtype;
  Pointer ih, hh;  // [G*H]
  Pointer c;       // [H]
  Pointer c_bias;  // [H], may be null
};

struct Variant {
  bool normalised;
  double eps;                      // is added to the variance
  double zoneout_c, zoneout_h;     // rates, where there is no mask
  const void* dropout;             // [D, B, H] of the compute type: multiplies h where it enters W_hh h; null = ones
  const uint8_t *mask_c, *mask_h;  // bools [D, rows, H]: where the state keeps its old value; null = the rate decides
  Gains<const void*> gains[2];
  bool changes_c() const { return mask_c || zoneout_c != 0; }
};

struct VariantForwardParams {
  ForwardParams layer;  // packed is null
  Variant variant;
};

struct VariantBackwardParams {
  BackwardParams layer;  // gate_grads is null
  Variant variant;
  Gains<void*> gains[2];  // gradients, with the dtypes of the gains; null when not wanted
};

// What the forward saves of a row, if all of it has the compute type: [D, rows, variant_record] values. lstm: i, f, g,
// o, c' before zoneout, c', h'; gru: r, z, n, W_hn h + b_hn after normalisation, h'; [H] each. With layer normalisation
// the normalised W_ih x and W_hh h follow, [G*H] each, and kMoments numbers: the reciprocal standard deviations of W_ih
// x and of W_hh h, two each (for the gru that of r and z, then that of n), and the mean and reciprocal standard
// deviation of c' before zoneout.
constexpr int kMoments = 8;
enum VariantMoment { kOfInput = 0, kOfHidden = 2, kMeanOfC = 4, kOfC = 5 };

// Where the parts of a record are, for the constants of a cell (CellConstants).
template <class Cell>
struct VariantRecord {
  static constexpr int kBefore = Cell::kStateSlot;                         // lstm: c' before zoneout
  static constexpr int kC = kBefore + 1;                                   // lstm: c'
  static constexpr int kH = Cell::kCellState ? kC + 1 : Cell::kStateSlot;  // h'
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

// The same record as the CPU's kernels have it (rnn/cpu/variants/record.h). Slots that have 16 bits if shape.narrow
// come first; c' is there once unless zoneout changes it.
struct VariantParts {
  int64_t c, zoned_c, moments;  // where c' before zoneout, c' and the moments begin, in values of the compute type
  int64_t size;
};
inline VariantParts variant_parts(const LayerShape& shape, const Variant& variant) {
  const CellTraits traits = cell_traits(shape.cell);
  const int of_h = traits.cell_state ? 1 : traits.narrow;  // slots: h', and the gru's W_hn h + b_hn
  const int64_t first = (traits.bounded + of_h + (variant.normalised ? 2 * traits.gates : 0)) * shape.H;
  const int64_t c = shape.narrow ? (first + 1) / 2 : first;
  const int64_t zoned_c = c + (variant.changes_c() ? shape.H : 0);
  const int64_t moments = traits.cell_state ? zoned_c + shape.H : c;
  return {c, zoned_c, moments, moments + (variant.normalised ? kMoments : 0)};
}

Plan variant_plan(const LayerShape& shape, Isa isa, int threads, bool backward);
void variant_forward(const VariantForwardParams& params, const Runtime& runtime);
void variant_backward(const VariantBackwardParams& params, const Runtime& runtime);

}  // namespace dlk
