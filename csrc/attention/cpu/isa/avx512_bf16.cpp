#include "attention/cpu/system.h"

#ifdef DLK_AVX512_BF16

DLK_TARGET_BEGIN(DLK_TARGET_AVX512_BF16)
namespace dlk::avx512_bf16 {
constexpr Isa kIsa = Isa::avx512_bf16;
constexpr int kRegisters = 32;
constexpr bool kPairs = false;
#include "simd/avx512.h"
#include "simd/math.h"
#include "simd/bf16_pairs.h"
#include "simd/bf16_dots.h"
#include "attention/cpu/all.h"
}  // namespace dlk::avx512_bf16
DLK_TARGET_END

#endif  // DLK_AVX512_BF16
