// Vec of 16 floats or 8 doubles. Semantics: scalar.h.
#pragma once

#ifndef DLK_ISA
#define DLK_ISA avx512
#endif
#include "simd/isa.h"

DLK_ISA_BEGIN

constexpr int kRegisters = 32;

template <class C>
struct Vec;

DLK_INLINE __mmask16 lanes16(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
DLK_INLINE __mmask8 lanes8(int n) { return static_cast<__mmask8>((1u << n) - 1u); }

template <>
struct Vec<float> {
  static constexpr int size = 16;
  __m512 v;

  static DLK_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static DLK_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static DLK_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static DLK_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes16(n), p)}; }
  DLK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  DLK_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, lanes16(n), v); }
};

template <>
struct Vec<double> {
  static constexpr int size = 8;
  __m512d v;

  static DLK_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static DLK_INLINE Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static DLK_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static DLK_INLINE Vec load(const double* p, int n) { return {_mm512_maskz_loadu_pd(lanes8(n), p)}; }
  DLK_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  DLK_INLINE void store(double* p, int n) const { _mm512_mask_storeu_pd(p, lanes8(n), v); }
};

DLK_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm512_div_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> operator-(Vec<float> a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
DLK_INLINE Vec<double> operator-(Vec<double> a) { return {_mm512_xor_pd(a.v, _mm512_set1_pd(-0.0))}; }

DLK_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DLK_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
DLK_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
DLK_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }

// 1 / b for b > 0 and a / b for finite b >= 1, with an error of barely more than half an ulp. A step of Newton's method
// takes a third of the time of vdivps, which is not pipelined.
DLK_INLINE Vec<float> reciprocal(Vec<float> b) {
  const __m512 r = _mm512_rcp14_ps(b.v);
  // Where 1 / b is not a normal number the estimate r is the result: for infinite b, where r is 0, the step would give
  // NaN.
  const __mmask16 normal = _mm512_cmp_ps_mask(b.v, _mm512_set1_ps(8.5070592e37f), _CMP_LE_OQ);
  return {_mm512_mask_fmadd_ps(r, normal, _mm512_fnmadd_ps(b.v, r, _mm512_set1_ps(1.0f)), r)};
}
DLK_INLINE Vec<double> reciprocal(Vec<double> b) { return Vec<double>::set1(1) / b; }
DLK_INLINE Vec<float> reciprocal_of_normal(Vec<float> b) {  // where 1 / b is a normal number
  const __m512 r = _mm512_rcp14_ps(b.v);
  return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(b.v, r, _mm512_set1_ps(1.0f)), r)};
}
DLK_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
  const __m512 r = _mm512_rcp14_ps(b.v);
  const __m512 better = _mm512_fmadd_ps(r, _mm512_fnmadd_ps(b.v, r, _mm512_set1_ps(1.0f)), r);
  const __m512 q = _mm512_mul_ps(a.v, better);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(b.v, q, a.v), better, q)};
}
DLK_INLINE Vec<double> quotient(Vec<double> a, Vec<double> b) { return a / b; }

DLK_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
DLK_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
DLK_INLINE Vec<float> abs(Vec<float> a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
DLK_INLINE Vec<double> abs(Vec<double> a) { return {_mm512_andnot_pd(_mm512_set1_pd(-0.0), a.v)}; }
// 0xd8 is the truth table of sign ? b : a.
DLK_INLINE Vec<float> copysign(Vec<float> a, Vec<float> b) {
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  return {
      _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v), sign, 0xd8))};
}
DLK_INLINE Vec<double> copysign(Vec<double> a, Vec<double> b) {
  const __m512i sign = _mm512_set1_epi64(INT64_MIN);
  return {
      _mm512_castsi512_pd(_mm512_ternarylogic_epi64(_mm512_castpd_si512(a.v), _mm512_castpd_si512(b.v), sign, 0xd8))};
}

DLK_INLINE Vec<float> select_gt(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
DLK_INLINE Vec<double> select_gt(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
DLK_INLINE Vec<float> select_le(Vec<float> a, Vec<float> b, Vec<float> x, Vec<float> y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ), y.v, x.v)};
}
DLK_INLINE Vec<double> select_le(Vec<double> a, Vec<double> b, Vec<double> x, Vec<double> y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ), y.v, x.v)};
}
template <class C>
DLK_INLINE Vec<C> select_lt(Vec<C> a, Vec<C> b, Vec<C> x, Vec<C> y) {
  return select_gt(b, a, x, y);
}

// Adds (e0 + e2) + (e1 + e3) in each quarter, then the quarters as (q0 + q1) + (q2 + q3): the order of reduce_rows.
DLK_INLINE float hsum(Vec<float> a) {
  __m512 t = _mm512_add_ps(a.v, _mm512_permute_ps(a.v, 0x4e));
  t = _mm512_add_ps(t, _mm512_permute_ps(t, 0xb1));
  t = _mm512_add_ps(t, _mm512_shuffle_f32x4(t, t, 0xb1));
  return _mm512_cvtss_f32(_mm512_add_ps(t, _mm512_shuffle_f32x4(t, t, 0x4e)));
}
DLK_INLINE double hsum(Vec<double> a) {
  __m512d t = _mm512_add_pd(a.v, _mm512_permute_pd(a.v, 0x55));
  t = _mm512_add_pd(t, _mm512_shuffle_f64x2(t, t, 0xb1));
  return _mm512_cvtsd_f64(_mm512_add_pd(t, _mm512_shuffle_f64x2(t, t, 0x4e)));
}

// Sums over pairs of elements of two rows, interleaved in each quarter: a, b, a, b.
DLK_INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
DLK_INLINE __m512d add_pairs(__m512d a, __m512d b) {
  return _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
}
// The same for quarters: a0 + a1, a2 + a3, b0 + b1, b2 + b3.
DLK_INLINE __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
DLK_INLINE __m512d add_quarters(__m512d a, __m512d b) {
  return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
}

template <class C>
DLK_INLINE Vec<C> reduce_rows(const Vec<C> (&rows)[Vec<C>::size]);

template <>
DLK_INLINE Vec<float> reduce_rows<float>(const Vec<float> (&rows)[16]) {
  __m512 quads[4];
  DLK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d ab = _mm512_castps_pd(add_pairs(rows[4 * i].v, rows[4 * i + 1].v));
    const __m512d cd = _mm512_castps_pd(add_pairs(rows[4 * i + 2].v, rows[4 * i + 3].v));
    quads[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  return {add_quarters(add_quarters(quads[0], quads[1]), add_quarters(quads[2], quads[3]))};
}

template <>
DLK_INLINE Vec<double> reduce_rows<double>(const Vec<double> (&rows)[8]) {
  const __m512d pairs[4] = {add_pairs(rows[0].v, rows[1].v), add_pairs(rows[2].v, rows[3].v),
                            add_pairs(rows[4].v, rows[5].v), add_pairs(rows[6].v, rows[7].v)};
  return {add_quarters(add_quarters(pairs[0], pairs[1]), add_quarters(pairs[2], pairs[3]))};
}

// Quarter l of out[k * stride] is quarter k of in[l]: a 4x4 transpose of quarters.
DLK_INLINE void transpose_quarters(__m512 a, __m512 b, __m512 c, __m512 d, Vec<float>* out, int stride) {
  const __m512 ab02 = _mm512_shuffle_f32x4(a, b, 0x88), ab13 = _mm512_shuffle_f32x4(a, b, 0xdd);
  const __m512 cd02 = _mm512_shuffle_f32x4(c, d, 0x88), cd13 = _mm512_shuffle_f32x4(c, d, 0xdd);
  out[0].v = _mm512_shuffle_f32x4(ab02, cd02, 0x88);
  out[stride].v = _mm512_shuffle_f32x4(ab13, cd13, 0x88);
  out[2 * stride].v = _mm512_shuffle_f32x4(ab02, cd02, 0xdd);
  out[3 * stride].v = _mm512_shuffle_f32x4(ab13, cd13, 0xdd);
}
DLK_INLINE void transpose_quarters(__m512d a, __m512d b, __m512d c, __m512d d, Vec<double>* out, int stride) {
  const __m512d ab02 = _mm512_shuffle_f64x2(a, b, 0x88), ab13 = _mm512_shuffle_f64x2(a, b, 0xdd);
  const __m512d cd02 = _mm512_shuffle_f64x2(c, d, 0x88), cd13 = _mm512_shuffle_f64x2(c, d, 0xdd);
  out[0].v = _mm512_shuffle_f64x2(ab02, cd02, 0x88);
  out[stride].v = _mm512_shuffle_f64x2(ab13, cd13, 0x88);
  out[2 * stride].v = _mm512_shuffle_f64x2(ab02, cd02, 0xdd);
  out[3 * stride].v = _mm512_shuffle_f64x2(ab13, cd13, 0xdd);
}

DLK_INLINE void transpose(Vec<float> (&rows)[16]) {
  // Quarter l of quads[i][k] is column 4l + k of rows 4i .. 4i + 3.
  __m512 quads[4][4];
  DLK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 a = rows[4 * i].v, b = rows[4 * i + 1].v, c = rows[4 * i + 2].v, d = rows[4 * i + 3].v;
    const __m512d ab01 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), ab23 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd01 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), cd23 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    quads[i][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab01, cd01));
    quads[i][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab01, cd01));
    quads[i][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab23, cd23));
    quads[i][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab23, cd23));
  }
  DLK_UNROLL
  for (int k = 0; k < 4; ++k) transpose_quarters(quads[0][k], quads[1][k], quads[2][k], quads[3][k], rows + k, 4);
}

DLK_INLINE void transpose(Vec<double> (&rows)[8]) {
  // Quarter l of even[i] is column 2l, of odd[i] column 2l + 1, of rows 2i and 2i + 1.
  __m512d even[4], odd[4];
  DLK_UNROLL
  for (int i = 0; i < 4; ++i) {
    even[i] = _mm512_unpacklo_pd(rows[2 * i].v, rows[2 * i + 1].v);
    odd[i] = _mm512_unpackhi_pd(rows[2 * i].v, rows[2 * i + 1].v);
  }
  transpose_quarters(even[0], even[1], even[2], even[3], rows, 2);
  transpose_quarters(odd[0], odd[1], odd[2], odd[3], rows + 1, 2);
}

DLK_INLINE Vec<float> exponent_from_bits(Vec<float> t) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23))};
}
DLK_INLINE Vec<double> exponent_from_bits(Vec<double> t) {
  return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(t.v), 52))};
}

// y - floor(y), and x 2^floor(y).
DLK_INLINE Vec<float> above_floor(Vec<float> y) {
  return {_mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
DLK_INLINE Vec<float> scale_by_floor(Vec<float> x, Vec<float> y) { return {_mm512_scalef_ps(x.v, y.v)}; }

DLK_INLINE __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
DLK_INLINE __m256i load16(const void* p, int n) { return _mm256_maskz_loadu_epi16(lanes16(n), p); }
DLK_INLINE void store16(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
DLK_INLINE void store16(void* p, __m256i a, int n) { _mm256_mask_storeu_epi16(p, lanes16(n), a); }

DLK_INLINE Vec<float> bf16_to_vec(__m256i a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16))};
}
DLK_INLINE __m256i vec_to_bf16(Vec<float> a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_srli_epi32(sum, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40)));
}
DLK_INLINE __m256i vec_to_f16(Vec<float> a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

DLK_INLINE Vec<float> widen(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(p)));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
DLK_INLINE Vec<float> widen(const bf16* p) { return bf16_to_vec(load16(p)); }
DLK_INLINE Vec<float> widen(const bf16* p, int n) { return bf16_to_vec(load16(p, n)); }
DLK_INLINE Vec<float> widen(const f16* p) { return {_mm512_cvtph_ps(load16(p))}; }
DLK_INLINE Vec<float> widen(const f16* p, int n) { return {_mm512_cvtph_ps(load16(p, n))}; }

DLK_INLINE void narrow(bf16* p, Vec<float> a) { store16(p, vec_to_bf16(a)); }
DLK_INLINE void narrow(bf16* p, Vec<float> a, int n) { store16(p, vec_to_bf16(a), n); }
DLK_INLINE void narrow(f16* p, Vec<float> a) { store16(p, vec_to_f16(a)); }
DLK_INLINE void narrow(f16* p, Vec<float> a, int n) { store16(p, vec_to_f16(a), n); }

struct Words {
  static constexpr int size = 16;
  __m512i v;

  static DLK_INLINE Words set1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static DLK_INLINE Words load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  DLK_INLINE void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
};
DLK_INLINE Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
DLK_INLINE void multiply_wide(Words a, Words b, Words* high, Words* low) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  low->v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high->v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}

template <class C>
DLK_INLINE Vec<C> where_at_least(const uint32_t* words, uint32_t threshold, C value);
template <>
DLK_INLINE Vec<float> where_at_least<float>(const uint32_t* words, uint32_t threshold, float value) {
  const __mmask16 kept = _mm512_cmpge_epu32_mask(Words::load(words).v, Words::set1(threshold).v);
  return {_mm512_maskz_mov_ps(kept, _mm512_set1_ps(value))};
}
template <>
DLK_INLINE Vec<double> where_at_least<double>(const uint32_t* words, uint32_t threshold, double value) {
  const __mmask8 kept = _mm256_cmpge_epu32_mask(load16(words), _mm256_set1_epi32(static_cast<int>(threshold)));
  return {_mm512_maskz_mov_pd(kept, _mm512_set1_pd(value))};
}

template <class C>
DLK_INLINE Vec<C> bias_of_bools(const uint8_t* bytes);
template <>
DLK_INLINE Vec<float> bias_of_bools<float>(const uint8_t* bytes) {
  const __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(bytes)));
  const __mmask16 off = _mm_testn_epi8_mask(x, x);
  return {_mm512_maskz_mov_ps(off, _mm512_set1_ps(-std::numeric_limits<float>::infinity()))};
}
template <>
DLK_INLINE Vec<double> bias_of_bools<double>(const uint8_t* bytes) {
  const __m128i x = _mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(bytes)));
  const __mmask8 off = static_cast<__mmask8>(_mm_testn_epi8_mask(x, x));
  return {_mm512_maskz_mov_pd(off, _mm512_set1_pd(-std::numeric_limits<double>::infinity()))};
}

DLK_ISA_END
