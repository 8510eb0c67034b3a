// Vec, the vector of the instruction set that is compiled for (isa.h). Semantics of each operation: scalar.h.
#pragma once

#include "simd/isa.h"

#if DLK_ISA_NUMBER == DLK_NUMBER_scalar
#include "simd/scalar.h"
#elif DLK_ISA_NUMBER == DLK_NUMBER_avx2
#include "simd/avx2.h"
#else
#include "simd/avx512.h"
#endif
