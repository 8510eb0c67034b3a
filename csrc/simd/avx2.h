// Vec of 8 floats or 4 doubles. Semantics: scalar.h.
#pragma once

#ifndef DLK_ISA
#define DLK_ISA avx2
#endif
#include "simd/isa.h"

DLK_ISA_BEGIN

constexpr int kRegisters = 16;

template <class C>
struct Vec;

// Masks with all ones in the lanes below n.
DLK_INLINE __m256i lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DLK_INLINE __m256i lanes64(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

template <>
struct Vec<float> {
  static constexpr int size = 8;
  __m256 v;

  static DLK_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static DLK_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static DLK_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static DLK_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes32(n))}; }
  DLK_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  DLK_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, lanes32(n), v); }
};

template <>
struct Vec<double> {
  static constexpr int size = 4;
  __m256d v;

  static DLK_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static DLK_INLINE Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static DLK_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static DLK_INLINE Vec load(const double* p, int n) { return {_mm256_maskload_pd(p, lanes64(n))}; }
  DLK_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  DLK_INLINE void store(double* p, int n) const { _mm256_maskstore_pd(p, lanes64(n), v); }
};

DLK_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm256_sub_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm256_div_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator-(Vec<float> a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
DLK_INLINE Vec<double> operator-(Vec<double> a) { return {_mm256_xor_pd(a.v, _mm256_set1_pd(-0.0))}; }

DLK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
DLK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
DLK_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
DLK_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }

// avx512.h avoids the division; here that would gain little.
template <class C>
DLK_INLINE Vec<C> reciprocal(Vec<C> b) {
  return Vec<C>::set1(1) / b;
}
template <class C>
DLK_INLINE Vec<C> quotient(Vec<C> a, Vec<C> b) {
  return a / b;
}

DLK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> abs(Vec<float> a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
DLK_INLINE Vec<double> abs(Vec<double> a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
DLK_INLINE Vec<float> copysign(Vec<float> a, Vec<float> b) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, a.v), _mm256_and_ps(sign, b.v))};
}
DLK_INLINE Vec<double> copysign(Vec<double> a, Vec<double> b) {
  const __m256d sign = _mm256_set1_pd(-0.0);
  return {_mm256_or_pd(_mm256_andnot_pd(sign, a.v), _mm256_and_pd(sign, b.v))};
}

DLK_INLINE Vec<float> select_gt(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
DLK_INLINE Vec<double> select_gt(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ))};
}
DLK_INLINE Vec<float> select_le(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ))};
}
DLK_INLINE Vec<double> select_le(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ))};
}
template <class C>
DLK_INLINE Vec<C> select_lt(Vec<C> a, Vec<C> b, Vec<C> x, Vec<C> y) {
  return select_gt(b, a, x, y);
}

// Adds (e0 + e2) + (e1 + e3) in each half, then the halves: the order of reduce_rows.
DLK_INLINE float hsum(Vec<float> a) {
  __m256 t = _mm256_add_ps(a.v, _mm256_permute_ps(a.v, 0x4e));
  t = _mm256_add_ps(t, _mm256_permute_ps(t, 0xb1));
  return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
DLK_INLINE double hsum(Vec<double> a) {
  const __m256d t = _mm256_add_pd(a.v, _mm256_permute_pd(a.v, 0x5));
  return _mm_cvtsd_f64(_mm_add_sd(_mm256_castpd256_pd128(t), _mm256_extractf128_pd(t, 1)));
}

// Sums over pairs of elements of two rows, interleaved in each half: a, b, a, b.
DLK_INLINE __m256 add_pairs(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}
DLK_INLINE __m256d add_pairs(__m256d a, __m256d b) {
  return _mm256_add_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
}

template <class C>
DLK_INLINE Vec<C> reduce_rows(const Vec<C> (&rows)[Vec<C>::size]);

template <>
DLK_INLINE Vec<float> reduce_rows<float>(const Vec<float> (&rows)[8]) {
  __m256 quads[2];
  DLK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256d ab = _mm256_castps_pd(add_pairs(rows[4 * i].v, rows[4 * i + 1].v));
    const __m256d cd = _mm256_castps_pd(add_pairs(rows[4 * i + 2].v, rows[4 * i + 3].v));
    quads[i] =
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                        _mm256_permute2f128_ps(quads[0], quads[1], 0x31))};
}

template <>
DLK_INLINE Vec<double> reduce_rows<double>(const Vec<double> (&rows)[4]) {
  const __m256d ab = add_pairs(rows[0].v, rows[1].v);
  const __m256d cd = add_pairs(rows[2].v, rows[3].v);
  return {_mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31))};
}

DLK_INLINE void transpose(Vec<float> (&rows)[8]) {
  // quads[i][k] holds columns k and k + 4 of rows 4i .. 4i + 3, one in each half.
  __m256 quads[2][4];
  DLK_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256 a = rows[4 * i].v, b = rows[4 * i + 1].v, c = rows[4 * i + 2].v, d = rows[4 * i + 3].v;
    const __m256d ab01 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab23 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd01 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd23 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    quads[i][0] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab01, cd01));
    quads[i][1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab01, cd01));
    quads[i][2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab23, cd23));
    quads[i][3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab23, cd23));
  }
  DLK_UNROLL
  for (int k = 0; k < 4; ++k) {
    rows[k].v = _mm256_permute2f128_ps(quads[0][k], quads[1][k], 0x20);
    rows[k + 4].v = _mm256_permute2f128_ps(quads[0][k], quads[1][k], 0x31);
  }
}

DLK_INLINE void transpose(Vec<double> (&rows)[4]) {
  const __m256d ab0 = _mm256_unpacklo_pd(rows[0].v, rows[1].v), ab1 = _mm256_unpackhi_pd(rows[0].v, rows[1].v);
  const __m256d cd0 = _mm256_unpacklo_pd(rows[2].v, rows[3].v), cd1 = _mm256_unpackhi_pd(rows[2].v, rows[3].v);
  rows[0].v = _mm256_permute2f128_pd(ab0, cd0, 0x20);
  rows[1].v = _mm256_permute2f128_pd(ab1, cd1, 0x20);
  rows[2].v = _mm256_permute2f128_pd(ab0, cd0, 0x31);
  rows[3].v = _mm256_permute2f128_pd(ab1, cd1, 0x31);
}

DLK_INLINE Vec<float> exponent_from_bits(Vec<float> t) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23))};
}
DLK_INLINE Vec<double> exponent_from_bits(Vec<double> t) {
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t.v), 52))};
}

// Eight 16-bit values; AVX2 has no masked access of that width, so partial ones go through the stack.
DLK_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
DLK_INLINE __m128i load16(const uint16_t* p, int n) {
  if (n == 8) return load16(p);
  uint16_t lanes[8] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load16(lanes);
}
DLK_INLINE void store16(void* p, __m128i a) { _mm_storeu_si128(static_cast<__m128i*>(p), a); }
DLK_INLINE void store16(uint16_t* p, __m128i a, int n) {
  if (n == 8) return store16(p, a);
  uint16_t lanes[8];
  store16(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

DLK_INLINE Vec<float> bf16_to_vec(__m128i a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16))};
}
DLK_INLINE __m128i vec_to_bf16(Vec<float> a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
DLK_INLINE __m128i vec_to_f16(Vec<float> a) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

DLK_INLINE Vec<float> widen(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(p)));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
DLK_INLINE Vec<float> widen(const bf16* p) { return bf16_to_vec(load16(p)); }
DLK_INLINE Vec<float> widen(const bf16* p, int n) { return bf16_to_vec(load16(&p->bits, n)); }
DLK_INLINE Vec<float> widen(const f16* p) { return {_mm256_cvtph_ps(load16(p))}; }
DLK_INLINE Vec<float> widen(const f16* p, int n) { return {_mm256_cvtph_ps(load16(&p->bits, n))}; }

DLK_INLINE void narrow(bf16* p, Vec<float> a) { store16(p, vec_to_bf16(a)); }
DLK_INLINE void narrow(bf16* p, Vec<float> a, int n) { store16(&p->bits, vec_to_bf16(a), n); }
DLK_INLINE void narrow(f16* p, Vec<float> a) { store16(p, vec_to_f16(a)); }
DLK_INLINE void narrow(f16* p, Vec<float> a, int n) { store16(&p->bits, vec_to_f16(a), n); }

struct Words {
  static constexpr int size = 8;
  __m256i v;

  static DLK_INLINE Words set1(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  static DLK_INLINE Words load(const uint32_t* p) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(static_cast<const void*>(p)))};
  }
  DLK_INLINE void store(uint32_t* p) const { _mm256_storeu_si256(static_cast<__m256i*>(static_cast<void*>(p)), v); }
};
DLK_INLINE Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
DLK_INLINE void multiply_wide(Words a, Words b, Words* high, Words* low) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  low->v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high->v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

template <class C>
DLK_INLINE Vec<C> where_at_least(const uint32_t* words, uint32_t threshold, C value);
template <>
DLK_INLINE Vec<float> where_at_least<float>(const uint32_t* words, uint32_t threshold, float value) {
  const __m256i w = Words::load(words).v;
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(w, Words::set1(threshold).v), w);
  return {_mm256_and_ps(_mm256_castsi256_ps(kept), _mm256_set1_ps(value))};
}
template <>
DLK_INLINE Vec<double> where_at_least<double>(const uint32_t* words, uint32_t threshold, double value) {
  const __m128i w = load16(words);
  const __m128i kept = _mm_cmpeq_epi32(_mm_max_epu32(w, _mm_set1_epi32(static_cast<int>(threshold))), w);
  return {_mm256_and_pd(_mm256_castsi256_pd(_mm256_cvtepi32_epi64(kept)), _mm256_set1_pd(value))};
}

template <class C>
DLK_INLINE Vec<C> bias_of_bools(const uint8_t* bytes);
template <>
DLK_INLINE Vec<float> bias_of_bools<float>(const uint8_t* bytes) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(bytes))));
  const __m256 off = _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_setzero_si256()));
  return {_mm256_and_ps(off, _mm256_set1_ps(-std::numeric_limits<float>::infinity()))};
}
template <>
DLK_INLINE Vec<double> bias_of_bools<double>(const uint8_t* bytes) {
  int four;
  std::memcpy(&four, bytes, sizeof four);
  const __m256i x = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const __m256d off = _mm256_castsi256_pd(_mm256_cmpeq_epi64(x, _mm256_setzero_si256()));
  return {_mm256_and_pd(off, _mm256_set1_pd(-std::numeric_limits<double>::infinity()))};
}

DLK_ISA_END
