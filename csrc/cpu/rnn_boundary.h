// What the sequence and the cell operators share on their way from tensors to structs.
#pragma once

#include "../checks.h"
#include "boundary.h"
#include "rnn_ops.h"
#include "threads.h"

namespace dlk {

void remember_shape(const LayerShape& shape);

}  // namespace dlk
