// Products of int8 by VNNI: vpdpbusd adds the four products of a quad of the sum's row, which is broadcast, and a quad
// of its column to each of 16 int32 sums, modulo 2^32. The values of rows are unsigned, those of columns signed. Quads
// and sums are passed as the bits of floats. Only instruction sets that multiply bfloat16 take quads.
//
// With DLK_EMULATE_BF16 plain C++ computes the products.
#pragma once

#include "simd/vec.h"

DLK_ISA_BEGIN

struct Int8Emulation {
  static DLK_INLINE uint32_t dot(uint32_t row, uint32_t column, uint32_t sum) {
    for (int i = 0; i < 32; i += 8)
      sum += static_cast<uint32_t>(int32_t(row >> i & 255) * int32_t(static_cast<int8_t>(column >> i & 255)));
    return sum;
  }
};

template <class C>
struct Int8Quads;

#if DLK_ISA_NUMBER >= DLK_NUMBER_avx512_bf16

template <>
struct Int8Quads<float> {
  using V = Vec<float>;

#ifdef DLK_EMULATE_BF16
  static DLK_NOINLINE V dot(V a, V b, V sum) {
    uint32_t x[V::size], y[V::size], sums[V::size];
    std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y), std::memcpy(sums, &sum, sizeof sums);
    for (int i = 0; i < V::size; ++i) sums[i] = Int8Emulation::dot(x[i], y[i], sums[i]);
    std::memcpy(&sum, sums, sizeof sums);
    return sum;
  }
#else
  static DLK_INLINE V dot(V a, V b, V sum) { return of(_mm512_dpbusd_epi32(bits(sum), bits(a), bits(b))); }
#endif
  static DLK_INLINE V add(V a, V b) { return of(_mm512_add_epi32(bits(a), bits(b))); }
  // sum - less, as float.
  static DLK_INLINE V difference(V sum, V less) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(bits(sum), bits(less)))};
  }

  // Rounds n values to multiples of the returned scale and writes each multiple plus 128, 1 to 255; `out` has room for
  // whole vectors. The greatest multiple is 127. The scale is NaN if a value is not finite, and 0 if all are (nearly)
  // 0.
  static DLK_INLINE float quantize(const float* from, int64_t n, uint8_t* out) {
    const auto part = [&](int64_t j) __attribute__((always_inline)) {
      return n - j >= V::size ? V::load(from + j) : V::load(from + j, static_cast<int>(n - j));
    };
    // As integers, infinity is greater than all finite magnitudes, and NaN is greater still.
    __m512i most = _mm512_setzero_si512();
    for (int64_t j = 0; j < n; j += V::size) most = _mm512_max_epi32(most, bits(abs(part(j))));
    const int32_t top = _mm512_reduce_max_epi32(most);
    const float largest = bits_float(static_cast<uint32_t>(top));
    const float up = largest < kLeast ? 0 : kMost / largest;
    const __m512i middle = _mm512_set1_epi32(128);
    for (int64_t j = 0; j < n; j += V::size) {
      const __m512i multiple = _mm512_cvtps_epi32((part(j) * V::set1(up)).v);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), _mm512_cvtepi32_epi8(_mm512_add_epi32(multiple, middle)));
    }
    if (top >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
    return largest < kLeast ? 0 : largest / kMost;
  }

 private:
  static constexpr float kMost = 127, kLeast = 1e-35f;  // kMost / kLeast and kLeast / kMost are normal numbers
  static DLK_INLINE __m512i bits(V a) { return _mm512_castps_si512(a.v); }
  static DLK_INLINE V of(__m512i a) { return {_mm512_castsi512_ps(a)}; }
};

#endif

DLK_ISA_END
