// Emulates the AVX-512 intrinsics that csrc/simd uses on machines that have AVX2 only. They are declared in namespace
// dlk, where name lookup finds them before those of the compiler. The compiler includes this file before everything
// else (-include), with DLK_EMULATE_AVX512 (simd/target.h).
//
// Arithmetic is done by AVX2 on each half of a vector. Masked loads and stores are plain scalar loads and stores, which
// the address sanitizer checks element by element.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd/system.h"

#if defined(DLK_X86) && defined(DLK_EMULATE_AVX512)
#pragma GCC diagnostic ignored "-Wignored-attributes"

// The compiler defines these intrinsics as macros at some optimisation levels.
#undef _mm512_cmp_pd_mask
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_permute_pd
#undef _mm512_permute_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_f64x2
#undef _mm512_slli_epi32
#undef _mm512_slli_epi64
#undef _mm512_srli_epi32
#undef _mm512_srli_epi64
#undef _mm512_ternarylogic_epi32
#undef _mm512_ternarylogic_epi64
#undef _mm256_cmpge_epu32_mask

DLK_TARGET_BEGIN(DLK_TARGET_avx2)
namespace dlk {
namespace avx512_emulation {

template <class To, class From>
DLK_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A vector as two halves (AVX2) or four quarters (SSE).
template <class Part, class Whole>
struct Parts {
  static constexpr int count = sizeof(Whole) / sizeof(Part);
  Part part[count];
  explicit DLK_INLINE Parts(Whole whole) { std::memcpy(part, &whole, sizeof part); }
  Parts() = default;
  DLK_INLINE Whole whole() const {
    Whole whole;
    std::memcpy(&whole, part, sizeof whole);
    return whole;
  }
};

template <class Half, class F, class V, class... More>
DLK_INLINE V by_halves(F f, V a, More... more) {
  const Parts<Half, V> x(a);
  Parts<Half, V> out;
  for (int i = 0; i < 2; ++i) out.part[i] = f(x.part[i], Parts<Half, V>(more).part[i]...);
  return out.whole();
}

// Sets all bits of the lanes whose bit in `mask` is set: 8 lanes of 4 bytes or 4 lanes of 8 bytes.
DLK_INLINE __m256i lanes(unsigned mask, float) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}
DLK_INLINE __m256i lanes(unsigned mask, double) {
  const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(mask), bit), bit);
}

// Takes the lanes of b where the mask is set and those of a elsewhere.
template <class T, class V>
DLK_INLINE V blend(unsigned mask, V a, V b) {
  const Parts<__m256i, V> x(a), y(b);
  Parts<__m256i, V> out;
  constexpr int half = 32 / sizeof(T);
  for (int i = 0; i < 2; ++i)
    out.part[i] = _mm256_blendv_epi8(x.part[i], y.part[i], lanes(mask >> (i * half) & ((1u << half) - 1), T()));
  return out.whole();
}

template <class V, class T, int n = sizeof(V) / sizeof(T)>
DLK_NOINLINE V masked_load(unsigned mask, const void* from) {
  T lanes[n];
  for (int i = 0; i < n; ++i) {
    lanes[i] = 0;
    if (mask >> i & 1) std::memcpy(&lanes[i], static_cast<const T*>(from) + i, sizeof(T));
  }
  return bits<V>(lanes);
}
template <class T, class V, int n = sizeof(V) / sizeof(T)>
DLK_NOINLINE void masked_store(void* to, unsigned mask, V a) {
  T lanes[n];
  std::memcpy(lanes, &a, sizeof lanes);
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<T*>(to) + i, &lanes[i], sizeof(T));
}

// 1 / a with the mantissa cut to 14 bits, exact for powers of two. The relative error is larger than that of vrcp14ps,
// but never above the 2^-14 that vrcp14ps guarantees.
DLK_INLINE __m256 rough_reciprocal(__m256 a) {
  const __m256 r = _mm256_div_ps(_mm256_set1_ps(1), a);
  const __m256 cut = _mm256_and_ps(r, _mm256_castsi256_ps(_mm256_set1_epi32(~0x1ff)));
  const __m256 least = _mm256_set1_ps(std::numeric_limits<float>::min());
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), r);
  return _mm256_blendv_ps(r, cut, _mm256_cmp_ps(size, least, _CMP_GE_OQ));
}

}  // namespace avx512_emulation

#define DLK_HALVES(type, half, name, same_name, parameters, ...)                                                       \
  DLK_INLINE type name parameters {                                                                                    \
    return avx512_emulation::by_halves<half>([](auto... x) __attribute__((always_inline)) { return same_name(x...); }, \
                                             __VA_ARGS__);                                                             \
  }
#define DLK_FLOATS(name)                                                                         \
  DLK_HALVES(__m512, __m256, _mm512_##name##_ps, _mm256_##name##_ps, (__m512 a, __m512 b), a, b) \
  DLK_HALVES(__m512d, __m256d, _mm512_##name##_pd, _mm256_##name##_pd, (__m512d a, __m512d b), a, b)
DLK_FLOATS(add)
DLK_FLOATS(sub)
DLK_FLOATS(mul)
DLK_FLOATS(div)
DLK_FLOATS(xor)
DLK_FLOATS(andnot)
DLK_FLOATS(min)
DLK_FLOATS(max)
DLK_FLOATS(unpacklo)
DLK_FLOATS(unpackhi)
#undef DLK_FLOATS
#define DLK_FUSED(name)                                                                                       \
  DLK_HALVES(__m512, __m256, _mm512_##name##_ps, _mm256_##name##_ps, (__m512 a, __m512 b, __m512 c), a, b, c) \
  DLK_HALVES(__m512d, __m256d, _mm512_##name##_pd, _mm256_##name##_pd, (__m512d a, __m512d b, __m512d c), a, b, c)
DLK_FUSED(fmadd)
DLK_FUSED(fnmadd)
#undef DLK_FUSED
#define DLK_INTEGERS(name, same_name) \
  DLK_HALVES(__m512i, __m256i, _mm512_##name, _mm256_##same_name, (__m512i a, __m512i b), a, b)
DLK_INTEGERS(add_epi32, add_epi32)
DLK_INTEGERS(mul_epu32, mul_epu32)
DLK_INTEGERS(and_si512, and_si256)
DLK_INTEGERS(or_si512, or_si256)
DLK_INTEGERS(xor_si512, xor_si256)
#undef DLK_INTEGERS
#undef DLK_HALVES
#define DLK_SHIFTS(name)                                                                                     \
  DLK_INLINE __m512i _mm512_##name(__m512i a, unsigned n) {                                                  \
    return avx512_emulation::by_halves<__m256i>(                                                             \
        [n](__m256i x) __attribute__((always_inline)) { return _mm256_##name(x, static_cast<int>(n)); }, a); \
  }
DLK_SHIFTS(slli_epi32)
DLK_SHIFTS(slli_epi64)
DLK_SHIFTS(srli_epi32)
DLK_SHIFTS(srli_epi64)
#undef DLK_SHIFTS

DLK_INLINE __m512i _mm512_castps_si512(__m512 a) { return avx512_emulation::bits<__m512i>(a); }
DLK_INLINE __m512i _mm512_castpd_si512(__m512d a) { return avx512_emulation::bits<__m512i>(a); }
DLK_INLINE __m512 _mm512_castsi512_ps(__m512i a) { return avx512_emulation::bits<__m512>(a); }
DLK_INLINE __m512 _mm512_castpd_ps(__m512d a) { return avx512_emulation::bits<__m512>(a); }
DLK_INLINE __m512d _mm512_castsi512_pd(__m512i a) { return avx512_emulation::bits<__m512d>(a); }
DLK_INLINE __m512d _mm512_castps_pd(__m512 a) { return avx512_emulation::bits<__m512d>(a); }
DLK_INLINE float _mm512_cvtss_f32(__m512 a) {
  return _mm256_cvtss_f32(avx512_emulation::Parts<__m256, __m512>(a).part[0]);
}
DLK_INLINE double _mm512_cvtsd_f64(__m512d a) {
  return _mm256_cvtsd_f64(avx512_emulation::Parts<__m256d, __m512d>(a).part[0]);
}

DLK_INLINE __m512 _mm512_set1_ps(float x) {
  const __m256 part[2] = {_mm256_set1_ps(x), _mm256_set1_ps(x)};
  return avx512_emulation::bits<__m512>(part);
}
DLK_INLINE __m512d _mm512_set1_pd(double x) {
  const __m256d part[2] = {_mm256_set1_pd(x), _mm256_set1_pd(x)};
  return avx512_emulation::bits<__m512d>(part);
}
DLK_INLINE __m512i _mm512_set1_epi32(int x) {
  const __m256i part[2] = {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
  return avx512_emulation::bits<__m512i>(part);
}
DLK_INLINE __m512i _mm512_set1_epi64(long long x) {
  const __m256i part[2] = {_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)};
  return avx512_emulation::bits<__m512i>(part);
}
DLK_INLINE __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0); }
DLK_INLINE __m512d _mm512_setzero_pd() { return _mm512_set1_pd(0); }

DLK_INLINE __m512 _mm512_loadu_ps(const void* p) {
  __m512 a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
DLK_INLINE __m512d _mm512_loadu_pd(const void* p) { return _mm512_castps_pd(_mm512_loadu_ps(p)); }
DLK_INLINE __m512i _mm512_loadu_si512(const void* p) { return _mm512_castps_si512(_mm512_loadu_ps(p)); }
DLK_INLINE void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof a); }
DLK_INLINE void _mm512_storeu_pd(void* p, __m512d a) { std::memcpy(p, &a, sizeof a); }
DLK_INLINE void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, sizeof a); }
DLK_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return avx512_emulation::masked_load<__m512, uint32_t>(mask, p);
}
DLK_INLINE __m512d _mm512_maskz_loadu_pd(__mmask8 mask, const void* p) {
  return avx512_emulation::masked_load<__m512d, uint64_t>(mask, p);
}
DLK_INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return avx512_emulation::masked_load<__m512i, uint16_t>(mask, p);
}
DLK_INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return avx512_emulation::masked_load<__m256i, uint16_t>(mask, p);
}
DLK_INLINE void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 a) {
  avx512_emulation::masked_store<uint32_t>(p, mask, a);
}
DLK_INLINE void _mm512_mask_storeu_pd(void* p, __mmask8 mask, __m512d a) {
  avx512_emulation::masked_store<uint64_t>(p, mask, a);
}
DLK_INLINE void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i a) {
  avx512_emulation::masked_store<uint16_t>(p, mask, a);
}

DLK_INLINE __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return avx512_emulation::blend<float>(mask, a, b);
}
DLK_INLINE __m512d _mm512_mask_blend_pd(__mmask8 mask, __m512d a, __m512d b) {
  return avx512_emulation::blend<double>(mask, a, b);
}
DLK_INLINE __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  return avx512_emulation::blend<float>(mask, a, b);
}
DLK_INLINE __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
  return _mm512_mask_blend_ps(mask, _mm512_setzero_ps(), a);
}
DLK_INLINE __m512d _mm512_maskz_mov_pd(__mmask8 mask, __m512d a) {
  return _mm512_mask_blend_pd(mask, _mm512_setzero_pd(), a);
}
DLK_INLINE __m512i _mm512_mask_or_epi32(__m512i source, __mmask16 mask, __m512i a, __m512i b) {
  return _mm512_mask_blend_epi32(mask, source, _mm512_or_si512(a, b));
}
DLK_INLINE __m512 _mm512_mask_fmadd_ps(__m512 a, __mmask16 mask, __m512 b, __m512 c) {
  return _mm512_mask_blend_ps(mask, a, _mm512_fmadd_ps(a, b, c));
}
DLK_INLINE __m512 _mm512_rcp14_ps(__m512 a) {
  return avx512_emulation::by_halves<__m256>(
      [](__m256 x) __attribute__((always_inline)) { return avx512_emulation::rough_reciprocal(x); }, a);
}

DLK_INLINE __m512 _mm512_reduce_ps(__m512 a, int) {  // only towards the floor, to no bits after the point
  avx512_emulation::Parts<float, __m512> x(a);
  for (float& value : x.part) value = std::isinf(value) ? 0 : value - std::floor(value);
  return x.whole();
}
DLK_INLINE __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  avx512_emulation::Parts<float, __m512> x(a);
  const avx512_emulation::Parts<float, __m512> y(b);
  for (int i = 0; i < 16; ++i) {
    const float power = std::fmin(std::fmax(std::floor(y.part[i]), -400.0f), 400.0f);
    x.part[i] = y.part[i] != y.part[i] ? y.part[i] : std::ldexp(x.part[i], static_cast<int>(power));
  }
  return x.whole();
}

DLK_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  const avx512_emulation::Parts<__m256, __m512> x(a), y(b);
  int mask = 0;
  for (int i = 0; i < 2; ++i) {
    __m256 is;
    switch (predicate) {
      case _CMP_GT_OQ:
        is = _mm256_cmp_ps(x.part[i], y.part[i], _CMP_GT_OQ);
        break;
      case _CMP_LE_OQ:
        is = _mm256_cmp_ps(x.part[i], y.part[i], _CMP_LE_OQ);
        break;
      case _CMP_UNORD_Q:
        is = _mm256_cmp_ps(x.part[i], y.part[i], _CMP_UNORD_Q);
        break;
      default:
        __builtin_trap();
    }
    mask |= _mm256_movemask_ps(is) << 8 * i;
  }
  return static_cast<__mmask16>(mask);
}
DLK_INLINE __mmask8 _mm512_cmp_pd_mask(__m512d a, __m512d b, int predicate) {
  const avx512_emulation::Parts<__m256d, __m512d> x(a), y(b);
  int mask = 0;
  for (int i = 0; i < 2; ++i) {
    __m256d is;
    switch (predicate) {
      case _CMP_GT_OQ:
        is = _mm256_cmp_pd(x.part[i], y.part[i], _CMP_GT_OQ);
        break;
      case _CMP_LE_OQ:
        is = _mm256_cmp_pd(x.part[i], y.part[i], _CMP_LE_OQ);
        break;
      default:
        __builtin_trap();
    }
    mask |= _mm256_movemask_pd(is) << 4 * i;
  }
  return static_cast<__mmask8>(mask);
}
DLK_INLINE __mmask8 _mm256_cmpge_epu32_mask(__m256i a, __m256i b) {
  const __m256i is = _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a);
  return static_cast<__mmask8>(_mm256_movemask_ps(_mm256_castsi256_ps(is)));
}
DLK_INLINE __mmask16 _mm512_cmpge_epu32_mask(__m512i a, __m512i b) {
  const avx512_emulation::Parts<__m256i, __m512i> x(a), y(b);
  return static_cast<__mmask16>(_mm256_cmpge_epu32_mask(x.part[0], y.part[0]) |
                                _mm256_cmpge_epu32_mask(x.part[1], y.part[1]) << 8);
}
DLK_INLINE __mmask16 _mm_testn_epi8_mask(__m128i a, __m128i b) {
  return static_cast<__mmask16>(_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128())));
}

// Bit 4 a + 2 b + c of `table` is the result for the input bits a, b and c.
DLK_INLINE __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  uint64_t x[3][8], out[8] = {};
  std::memcpy(x[0], &a, sizeof out), std::memcpy(x[1], &b, sizeof out), std::memcpy(x[2], &c, sizeof out);
  for (int i = 0; i < 8; ++i)
    for (int row = 0; row < 8; ++row)
      if (table >> row & 1)
        out[i] |= (row & 4 ? x[0][i] : ~x[0][i]) & (row & 2 ? x[1][i] : ~x[1][i]) & (row & 1 ? x[2][i] : ~x[2][i]);
  return avx512_emulation::bits<__m512i>(out);
}
DLK_INLINE __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  return _mm512_ternarylogic_epi32(a, b, c, table);
}

DLK_INLINE __m512 _mm512_permute_ps(__m512 a, int order) {
  const __m256i each = _mm256_setr_epi32(order, order >> 2, order >> 4, order >> 6, order, order >> 2, order >> 4,
                                         order >> 6);  // vpermilps reads only the lowest two bits of each
  return avx512_emulation::by_halves<__m256>(
      [each](__m256 x) __attribute__((always_inline)) { return _mm256_permutevar_ps(x, each); }, a);
}
DLK_INLINE __m512d _mm512_permute_pd(__m512d a, int order) {
  double x[8], out[8];
  std::memcpy(x, &a, sizeof x);
  for (int i = 0; i < 8; ++i) out[i] = x[(i & ~1) + (order >> i & 1)];
  return avx512_emulation::bits<__m512d>(out);
}
// The result is two quarters of a followed by two quarters of b.
DLK_INLINE __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  const avx512_emulation::Parts<__m128, __m512> x(a), y(b);
  const __m128 part[4] = {x.part[order & 3], x.part[order >> 2 & 3], y.part[order >> 4 & 3], y.part[order >> 6 & 3]};
  return avx512_emulation::bits<__m512>(part);
}
DLK_INLINE __m512d _mm512_shuffle_f64x2(__m512d a, __m512d b, int order) {
  return _mm512_castps_pd(_mm512_shuffle_f32x4(_mm512_castpd_ps(a), _mm512_castpd_ps(b), order));
}

DLK_INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const avx512_emulation::Parts<__m128i, __m256i> x(a);
  const __m256i part[2] = {_mm256_cvtepu16_epi32(x.part[0]), _mm256_cvtepu16_epi32(x.part[1])};
  return avx512_emulation::bits<__m512i>(part);
}
DLK_INLINE __m512i _mm512_cvtepi16_epi32(__m256i a) {
  const avx512_emulation::Parts<__m128i, __m256i> x(a);
  const __m256i part[2] = {_mm256_cvtepi16_epi32(x.part[0]), _mm256_cvtepi16_epi32(x.part[1])};
  return avx512_emulation::bits<__m512i>(part);
}
DLK_INLINE __m512 _mm512_cvtepi32_ps(__m512i a) {
  const avx512_emulation::Parts<__m256i, __m512i> x(a);
  const __m256 part[2] = {_mm256_cvtepi32_ps(x.part[0]), _mm256_cvtepi32_ps(x.part[1])};
  return avx512_emulation::bits<__m512>(part);
}
DLK_INLINE __m512i _mm512_cvtps_epi32(__m512 a) {
  const avx512_emulation::Parts<__m256, __m512> x(a);
  const __m256i part[2] = {_mm256_cvtps_epi32(x.part[0]), _mm256_cvtps_epi32(x.part[1])};
  return avx512_emulation::bits<__m512i>(part);
}
DLK_INLINE __m256i _mm512_cvtsepi32_epi16(__m512i a) {
  int32_t x[16];
  int16_t out[16];
  std::memcpy(x, &a, sizeof x);
  for (int i = 0; i < 16; ++i) out[i] = static_cast<int16_t>(x[i] < -32768 ? -32768 : x[i] > 32767 ? 32767 : x[i]);
  return avx512_emulation::bits<__m256i>(out);
}
DLK_INLINE __m256i _mm512_cvtepi32_epi16(__m512i a) {
  uint16_t x[32], out[16];
  std::memcpy(x, &a, sizeof x);
  for (int i = 0; i < 16; ++i) out[i] = x[2 * i];
  return avx512_emulation::bits<__m256i>(out);
}
DLK_INLINE __m512 _mm512_cvtph_ps(__m256i a) {
  const avx512_emulation::Parts<__m128i, __m256i> x(a);
  const __m256 part[2] = {_mm256_cvtph_ps(x.part[0]), _mm256_cvtph_ps(x.part[1])};
  return avx512_emulation::bits<__m512>(part);
}
DLK_INLINE __m256i _mm512_cvtps_ph(__m512 a, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  const avx512_emulation::Parts<__m256, __m512> x(a);
  const __m128i part[2] = {_mm256_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(x.part[1], _MM_FROUND_TO_NEAREST_INT)};
  return avx512_emulation::bits<__m256i>(part);
}

}  // namespace dlk
DLK_TARGET_END

#endif
