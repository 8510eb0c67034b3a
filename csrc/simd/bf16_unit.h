// Bf16Unit, what multiplies bfloat16 in the instruction set that is compiled for.
#pragma once

#include "simd/vec.h"

#if DLK_ISA_NUMBER == DLK_NUMBER_avx512_bf16
#include "simd/bf16_dots.h"
#elif DLK_ISA_NUMBER == DLK_NUMBER_amx
#include "simd/amx_tiles.h"
#else
DLK_ISA_BEGIN
using Bf16Unit = NoBf16Unit;
DLK_ISA_END
#endif
