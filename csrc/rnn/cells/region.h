// Where the equations of a cell are compiled: in the region of an instruction set (simd/isa.h), over its vectors,
// unless whoever includes them has set the marks, as the CUDA kernels do (rnn/cuda/real.h).
#pragma once

#include "rnn/cells/traits.h"

#ifndef DLK_CELLS_BEGIN
#include "simd/math.h"
#define DLK_CELLS_BEGIN DLK_ISA_BEGIN
#define DLK_CELLS_END DLK_ISA_END
#endif
