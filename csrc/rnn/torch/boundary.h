// What the sequence and the cell operators share on their way from tensors to structs.
#pragma once

#include "torch/checks.h"
#include "torch/arguments.h"
#include "ops.h"
#include "torch/threads.h"

namespace dlk {

void remember_shape(const LayerShape& shape);

// For LayerShape::narrow.
inline bool has_narrow_slots(DType product) { return product == DType::bf16 || product == DType::f16; }

}  // namespace dlk
