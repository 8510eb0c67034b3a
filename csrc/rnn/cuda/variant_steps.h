// Runs a layer with layer normalisation, zoneout or recurrent dropout on a GPU step by step: for each step and
// direction the caller's product and one kernel of variants.h. No CUDA and no torch in here.
#pragma once

#include "rows.h"
#include "steps.h"
#include "variants.h"

namespace dlk {

// What the forward and the backward have in common. All pointers but batch_sizes are to device memory.
struct VariantLayer {
  CellKind cell;
  int T, B, H, D;
  int64_t rows;
  const int64_t* batch_sizes;  // on the host: [T], null = padded
  const int* offsets;          // [T + 1], null = padded
  const int64_t* lengths;      // [B], clamped to 0..T by the kernels; null = T
  StepVariant variants[2];
  const uint8_t *mask_c, *mask_h;  // [D, rows, H], time-major, or null
};

struct VariantForwardSteps {
  VariantLayer layer;
  RowTensor<const float*> gates[2];  // W_ih x, without biases: features G*H
  float* gates_h;                    // [B, G*H]
  float *h, *c;                      // [D, B, H]: h_0, and c_0 of the lstm; every step updates them
  void *h_n, *c_n;                   // the same in the layer's dtype
  void* operand;                     // [D, B, H] in the layer's dtype: with dropout h_0 times it, else null
  RowTensor<void*> y;                // features D*H
  float* saved;                      // [D, rows, variant_record], time-major, or null
};

// `multiply` reads operand[d], or without dropout h_n[d], and writes gates_h = W_hh times that, in float32.
int run_variant_forward(const VariantForwardSteps& params, DType dtype, const StepProduct& multiply, void* stream);

struct VariantBackwardSteps {
  VariantLayer layer;
  int64_t bptt_steps;
  const float* saved;
  const void *h0, *c0;            // [D, B, H] in the layer's dtype, or null
  RowTensor<const void*> dy;      // features D*H, or absent
  void* hidden;                   // [D, B, G*H] in the layer's dtype
  float* product;                 // [B, H]
  float *dh, *dc;                 // [D, B, H]: dh_n and dc_n
  float* grads[2];                // [rows, variant_grads * H], time-major; nothing is written in rows not alive
  RowTensor<void*> of_input[2];   // gradients of W_ih x, and
  RowTensor<void*> of_hidden[2];  // of W_hh h: G*H features, in the layer's dtype; absent if they are the same
  void *dh0, *dc0;                // [D, B, H] in the layer's dtype, or null
};

// `multiply` reads hidden[d], which the last step writes first, and writes product = hidden W_hh, in float32. T > 0.
int run_variant_backward(const VariantBackwardSteps& params, DType dtype, const StepProduct& multiply, void* stream);

// The h of one direction that W_hh multiplies at each step, dropout included: where it is, but for `to`.
HiddenBefore variant_hidden(const VariantLayer& layer, int d, const float* saved, const void* h0, DType dtype);

}  // namespace dlk
