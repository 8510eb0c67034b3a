// Instructions that multiply bf16 take two consecutive values at a time, a pair. The code passes a pair as the bits of
// a float, with the even value in the lower half.
//
// With DLK_EMULATE_BF16 plain C++ computes the products with the same bits, for machines without the instructions.
#pragma once

#ifndef DLK_ISA
#define DLK_ISA avx512_bf16
#endif
#include "simd/vec.h"

DLK_ISA_BEGIN

#ifdef DLK_EMULATE_BF16

struct Bf16Emulation {
  // Denormal operands and results count as 0.
  static float normal(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
  // x y + sum. A result is tiny if it is below the least normal number before it is rounded to a multiple of the least
  // denormal; that rounding may make it the least normal number, so the test repeats the sum in a larger scale.
  static float fused(float x, float y, float sum) {
    constexpr float kLeast = std::numeric_limits<float>::min(), kUp = 0x1p64f;
    const float z = __builtin_fmaf(x, y, sum);
    const bool tiny = std::fabs(z) == kLeast && std::fabs(__builtin_fmaf(x * kUp, y, sum * kUp)) < kLeast * kUp;
    return tiny ? std::copysign(0.0f, z) : normal(z);
  }
  static float value(uint32_t pair, int half) { return normal(bits_float(half ? pair & 0xffff0000u : pair << 16)); }
};

#endif

struct Bf16Pairs {
  static constexpr int kSize = 16;   // pairs in a vector
  static constexpr int kWidth = 32;  // values in it

  // Returns n consecutive values, 0..32, as pairs; zeros beyond.
  static DLK_INLINE Vec<float> pairs(const bf16* from, int n) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), from))};
  }
  // Returns n and m values, 0..16, of two rows: the even values are those of a, the odd ones those of b; zeros beyond.
  static DLK_INLINE Vec<float> pairs(const bf16* a, int n, const bf16* b, int m) {
    const __m512i low = _mm512_cvtepu16_epi32(load16(a, n)), high = _mm512_cvtepu16_epi32(load16(b, m));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  // The same with two vectors, rounded to nearest, ties to even (NaN stays NaN).
  static DLK_INLINE Vec<float> pairs(Vec<float> a, Vec<float> b) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(rounded_bits(a), 16), _mm512_and_si512(rounded_bits(b), upper)))};
  }
  static DLK_INLINE void store(Vec<float> pairs, bf16* to) { _mm512_storeu_ps(to, pairs.v); }
  static DLK_INLINE void round(Vec<float> a, bf16* to) { narrow(to, a); }

#ifdef DLK_EMULATE_BF16
  static Vec<float> normal(Vec<float> a) {
    return select_lt(abs(a), Vec<float>::set1(std::numeric_limits<float>::min()), copysign(Vec<float>::zero(), a), a);
  }
#endif

 private:
  static DLK_INLINE __m512i rounded_bits(Vec<float> a) {  // in the upper half of each lane
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_mask_or_epi32(sum, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  }
};

DLK_ISA_END
