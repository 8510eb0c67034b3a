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

// The end of what the forward saves of a row with layer normalisation, kMoments numbers: the reciprocal standard
// deviations of W_ih x and of W_hh h, two each (for the gru that of r and z, then that of n), and the mean and
// reciprocal standard deviation of c' before zoneout.
constexpr int kMoments = 8;
enum VariantMoment { kOfInput = 0, kOfHidden = 2, kMeanOfC = 4, kOfC = 5 };

// The record of a row on the CPU. Slots that have 16 bits if shape.narrow come first (rnn/cpu/variants/record.h has
// their order), then the lstm's c', which is there once unless zoneout changes it, then the moments.
struct VariantParts {
  // Where the lstm's c' before zoneout, its c' after zoneout and the moments begin, in values of the compute type.
  int64_t c, zoned_c, moments;
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
