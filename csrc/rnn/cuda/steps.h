// Runs the recurrence of a layer on a GPU step by step, if W_hh is too large to stay on the chip: the caller's product
// and one cell kernel for each step and direction. No CUDA and no torch in here.
#pragma once

#include <functional>

#include "cell.h"
#include "sequence.h"

namespace dlk {

// Forward: reads h_n[d] [B, H], writes gates_h [B, G*H] = h_n W_hh^T in float32.
// Backward: reads hidden[d] [B, G*H], writes product [B, H] = hidden W_hh in float32.
using StepProduct = std::function<int(int direction)>;

struct ForwardSteps {
  const int64_t* batch_sizes;  // on the host: [T], null = padded
  float* gates_h;              // [B, G*H]
  float* state;                // [D, B, H]: c_0 (lstm) or h_0 (gru) in float32; unused by the rnn
};

// On entry params.h_n and c_n must hold h_0 and c_0; every step updates them.
int run_forward_steps(const SequenceForward& params, const ForwardSteps& steps, DType dtype,
                      const StepProduct& multiply, void* stream);

struct BackwardSteps {
  const int64_t* batch_sizes;
  void* hidden;    // [D, B, G*H] in the layer's dtype, zeros
  float* product;  // [B, H]
  float* carry;    // [D, B, H]: dh_n in float32
  float* dc;       // [D, B, H]: dc_n in float32, lstm only; becomes dc_0
};

// params.bias_sums is [1, D, ...] as for a single tile; with more than kSegmentRows sequences it is
// [ceil(B / kSegmentRows), D, ...]. dh_0 and dc_0 are written as by the sequence kernel.
int run_backward_steps(const SequenceBackward& params, const BackwardSteps& steps, DType dtype,
                       const StepProduct& multiply, void* stream);

}  // namespace dlk
