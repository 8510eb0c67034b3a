#include "attention/cpu/system.h"

#ifdef DLK_X86

DLK_TARGET_BEGIN(DLK_TARGET_AVX512)
namespace dlk::avx512 {
constexpr Isa kIsa = Isa::avx512;
constexpr int kRegisters = 32;
constexpr bool kPairs = false;
using Bf16Unit = NoBf16Unit;
#include "simd/avx512.h"
#include "simd/math.h"
#include "attention/cpu/all.h"
}  // namespace dlk::avx512
DLK_TARGET_END

#endif  // DLK_X86
