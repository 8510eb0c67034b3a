// Values within [-1, 1] in 16 bits, as multiples of 1/32767. Unlike bf16 and f16 they are as close together near 1 as
// near 0.
#pragma once

#include "simd/vec.h"

namespace dlk {

struct fixed16 {
  int16_t steps;  // -32768 is NaN
};

}  // namespace dlk

DLK_ISA_BEGIN

constexpr float kFixed16Steps = 32767;

// n values, each rounded to the nearest step. What is beyond [-1, 1] is not kept.
DLK_INLINE void store_fixed(fixed16* p, Vec<float> a, int n) {
  const Vec<float> steps = a * Vec<float>::set1(kFixed16Steps);
#if DLK_ISA_NUMBER == DLK_NUMBER_scalar
  // The ulp of 1.5 * 2^23 is 1: the addition rounds, and the sum's low bits are the result.
  if (n > 0) p->steps = static_cast<int16_t>(steps.v != steps.v ? 0x8000u : float_bits(steps.v + 0x1.8p23f) & 0xffffu);
#elif DLK_ISA_NUMBER == DLK_NUMBER_avx2
  // A NaN becomes the least 32-bit integer and then, as below, the least 16-bit one.
  const __m256i whole = _mm256_cvtps_epi32(steps.v);
  store16(static_cast<uint16_t*>(static_cast<void*>(p)),
          _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)), n);
#else
  store16(p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(steps.v)), n);
#endif
}

// n values; the other lanes are 0.
DLK_INLINE Vec<float> load_fixed(const fixed16* p, int n) {
#if DLK_ISA_NUMBER == DLK_NUMBER_scalar
  const Vec<float> steps{n > 0 ? static_cast<float>(p->steps) : 0.0f};
#elif DLK_ISA_NUMBER == DLK_NUMBER_avx2
  const __m128i bits = load16(static_cast<const uint16_t*>(static_cast<const void*>(p)), n);
  const Vec<float> steps{_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(bits))};
#else
  const Vec<float> steps{_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(load16(p, n)))};
#endif
  const Vec<float> value = steps * Vec<float>::set1(1 / kFixed16Steps);
  return select_le(Vec<float>::set1(-1), value, value, Vec<float>::set1(std::numeric_limits<float>::quiet_NaN()));
}

DLK_ISA_END
