// Shared by the sequence and the cell operators, which translate tensors to the structs of rnn/params.h.
#pragma once

#include "torch/checks.h"
#include "torch/arguments.h"
#include "ops.h"
#include "torch/threads.h"

namespace dlk {

void remember_shape(const LayerShape& shape);

// The value of LayerShape::narrow in a call with this product dtype.
inline bool has_narrow_slots(DType product) { return product == DType::bf16 || product == DType::f16; }

}  // namespace dlk
