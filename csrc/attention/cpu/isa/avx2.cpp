#include "attention/cpu/system.h"

#ifdef DLK_X86

DLK_TARGET_BEGIN(DLK_TARGET_AVX2)
namespace dlk::avx2 {
constexpr Isa kIsa = Isa::avx2;
constexpr int kRegisters = 16;
constexpr bool kPairs = false;
using Bf16Unit = NoBf16Unit;
#include "simd/avx2.h"
#include "simd/math.h"
#include "attention/cpu/all.h"
}  // namespace dlk::avx2
DLK_TARGET_END

#endif  // DLK_X86
