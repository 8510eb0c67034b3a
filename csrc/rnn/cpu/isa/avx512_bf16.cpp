#include "rnn/cpu/system.h"

#ifdef DLK_AVX512_BF16

DLK_TARGET_BEGIN(DLK_TARGET_AVX512_BF16)
namespace dlk::avx512_bf16_layers {  // not that of attention, whose float32 products are of floats
constexpr Isa kIsa = Isa::avx512_bf16;
constexpr int kRegisters = 32;
constexpr bool kPairs = true;
#include "simd/avx512.h"
#include "simd/math.h"
#include "simd/bf16_pairs.h"
#include "simd/bf16_dots.h"
#include "rnn/cpu/all.h"
}  // namespace dlk::avx512_bf16_layers
DLK_TARGET_END

#endif  // DLK_AVX512_BF16
