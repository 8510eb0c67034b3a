// Defines Vec, the vector type of the instruction set that is compiled for (isa.h), and kRegisters, how many vector
// registers that has. scalar.h shows what each operation means.
#pragma once

#include "simd/isa.h"

#if DLK_ISA_NUMBER == DLK_NUMBER_scalar
#include "simd/scalar.h"
#elif DLK_ISA_NUMBER == DLK_NUMBER_avx2
#include "simd/avx2.h"
#elif DLK_ISA_NUMBER == DLK_NUMBER_avx512 || DLK_ISA_NUMBER == DLK_NUMBER_avx512_bf16 || \
    DLK_ISA_NUMBER == DLK_NUMBER_amx
#include "simd/avx512.h"
#else
#error "DLK_ISA has no Vec here: a new row of core/isas.def needs a branch that includes the header with its Vec"
#endif
