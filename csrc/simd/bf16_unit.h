// Defines Bf16Unit, which multiplies bfloat16 with the instruction set that is compiled for: NoBf16Unit if it has no
// instructions for that.
#pragma once

#include "simd/vec.h"

#if DLK_ISA_NUMBER == DLK_NUMBER_avx512_bf16
#include "simd/bf16_dots.h"
#elif DLK_ISA_NUMBER == DLK_NUMBER_amx
#include "simd/amx_tiles.h"
#elif DLK_ISA_NUMBER == DLK_NUMBER_scalar || DLK_ISA_NUMBER == DLK_NUMBER_avx2 || DLK_ISA_NUMBER == DLK_NUMBER_avx512
DLK_ISA_BEGIN
using Bf16Unit = NoBf16Unit;
DLK_ISA_END
#else
#error "DLK_ISA has no Bf16Unit here: a new row of core/isas.def needs a branch (NoBf16Unit without bf16 instructions)"
#endif

DLK_ISA_BEGIN
static_assert(Bf16Unit::kPresent == (bf16_products(kIsa) != Bf16Products::as_float),
              "Bf16Unit must agree with the row of core/isas.def");
DLK_ISA_END
