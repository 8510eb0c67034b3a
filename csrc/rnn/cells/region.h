// The macros that enclose the equations of the cells. By default the equations are compiled for an instruction set
// (simd/isa.h) and its vectors; a file that defines the macros first, as rnn/cuda/real.h does, compiles them elsewhere.
#pragma once

#include "rnn/cells/traits.h"

#ifndef DLK_CELLS_BEGIN
#include "simd/math.h"
#define DLK_CELLS_BEGIN DLK_ISA_BEGIN
#define DLK_CELLS_END DLK_ISA_END
#endif
