// Vec of one lane, for the portable kernels; it also shows what each operation means on every ISA.
#pragma once

#include "simd/isa.h"

DLK_ISA_BEGIN

constexpr int kRegisters = 16;  // of x86-64; other 64-bit processors have at least as many

template <class C>
struct Vec {
  static constexpr int size = 1;
  C v;

  static DLK_INLINE Vec zero() { return {C(0)}; }
  static DLK_INLINE Vec set1(C x) { return {x}; }
  static DLK_INLINE Vec load(const C* p) { return {*p}; }
  // n in 0..size: lanes from n on read as 0, memory beyond n is not touched.
  static DLK_INLINE Vec load(const C* p, int n) { return {n > 0 ? *p : C(0)}; }
  DLK_INLINE void store(C* p) const { *p = v; }
  DLK_INLINE void store(C* p, int n) const {
    if (n > 0) *p = v;
  }
};

template <class C>
DLK_INLINE Vec<C> operator+(Vec<C> a, Vec<C> b) {
  return {a.v + b.v};
}
template <class C>
DLK_INLINE Vec<C> operator-(Vec<C> a, Vec<C> b) {
  return {a.v - b.v};
}
template <class C>
DLK_INLINE Vec<C> operator*(Vec<C> a, Vec<C> b) {
  return {a.v * b.v};
}
template <class C>
DLK_INLINE Vec<C> operator/(Vec<C> a, Vec<C> b) {
  return {a.v / b.v};
}
template <class C>
DLK_INLINE Vec<C> operator-(Vec<C> a) {
  return {-a.v};
}

template <class C>
DLK_INLINE Vec<C> reciprocal(Vec<C> b) {
  return {1 / b.v};
}
template <class C>
DLK_INLINE Vec<C> quotient(Vec<C> a, Vec<C> b) {
  return {a.v / b.v};
}

// a * b + c and c - a * b, rounded once if the ISA has such an instruction. Here std::fma would be a slow call.
template <class C>
DLK_INLINE Vec<C> fma(Vec<C> a, Vec<C> b, Vec<C> c) {
  return {a.v * b.v + c.v};
}
template <class C>
DLK_INLINE Vec<C> fnma(Vec<C> a, Vec<C> b, Vec<C> c) {
  return {c.v - a.v * b.v};
}

// x86 semantics on every ISA: a NaN in either operand gives b.
template <class C>
DLK_INLINE Vec<C> min(Vec<C> a, Vec<C> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class C>
DLK_INLINE Vec<C> max(Vec<C> a, Vec<C> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class C>
DLK_INLINE Vec<C> abs(Vec<C> a) {
  return {std::fabs(a.v)};
}

// |a| with the sign of b
template <class C>
DLK_INLINE Vec<C> copysign(Vec<C> a, Vec<C> b) {
  return {std::copysign(a.v, b.v)};
}

// a > b ? x : y, a < b ? x : y and a <= b ? x : y; a comparison with NaN is false.
template <class C>
DLK_INLINE Vec<C> select_gt(Vec<C> a, Vec<C> b, Vec<C> x, Vec<C> y) {
  return {a.v > b.v ? x.v : y.v};
}
template <class C>
DLK_INLINE Vec<C> select_lt(Vec<C> a, Vec<C> b, Vec<C> x, Vec<C> y) {
  return {a.v < b.v ? x.v : y.v};
}
template <class C>
DLK_INLINE Vec<C> select_le(Vec<C> a, Vec<C> b, Vec<C> x, Vec<C> y) {
  return {a.v <= b.v ? x.v : y.v};
}

// Sum of the lanes; bit for bit what reduce_rows gives for the row.
template <class C>
DLK_INLINE C hsum(Vec<C> a) {
  return a.v;
}

// Lane i is the sum of the lanes of rows[i].
template <class C>
DLK_INLINE Vec<C> reduce_rows(const Vec<C> (&rows)[Vec<C>::size]) {
  return rows[0];
}

// rows[i] lane j -> rows[j] lane i
template <class C>
DLK_INLINE void transpose(Vec<C> (&)[Vec<C>::size]) {}

// 2^n from the bits of 1.5 * 2^23 + 127 + n (float) or 1.5 * 2^52 + 1023 + n (double).
DLK_INLINE Vec<float> exponent_from_bits(Vec<float> t) { return {bits_float(float_bits(t.v) << 23)}; }
DLK_INLINE Vec<double> exponent_from_bits(Vec<double> t) {
  uint64_t bits;
  std::memcpy(&bits, &t.v, sizeof bits);
  bits <<= 52;
  std::memcpy(&t.v, &bits, sizeof bits);
  return t;
}

DLK_INLINE Vec<float> widen(const bf16* p, int n) { return {n > 0 ? to_float(*p) : 0.0f}; }
DLK_INLINE Vec<float> widen(const int8_t* p) { return {static_cast<float>(*p)}; }
DLK_INLINE Vec<float> widen(const bf16* p) { return {to_float(*p)}; }
DLK_INLINE Vec<float> widen(const f16* p, int n) { return {n > 0 ? to_float(*p) : 0.0f}; }
DLK_INLINE Vec<float> widen(const f16* p) { return {to_float(*p)}; }

DLK_INLINE void narrow(bf16* p, Vec<float> a) { *p = to_bf16(a.v); }
DLK_INLINE void narrow(bf16* p, Vec<float> a, int n) {
  if (n > 0) narrow(p, a);
}
DLK_INLINE void narrow(f16* p, Vec<float> a) { *p = to_f16(a.v); }
DLK_INLINE void narrow(f16* p, Vec<float> a, int n) {
  if (n > 0) narrow(p, a);
}

// A vector of as many unsigned 32-bit integers as Vec<float> has lanes.
struct Words {
  static constexpr int size = 1;
  uint32_t v;

  static DLK_INLINE Words set1(uint32_t x) { return {x}; }
  static DLK_INLINE Words load(const uint32_t* p) { return {*p}; }
  DLK_INLINE void store(uint32_t* p) const { *p = v; }
};
DLK_INLINE Words operator^(Words a, Words b) { return {a.v ^ b.v}; }
// The upper and lower halves of the 64-bit products.
DLK_INLINE void multiply_wide(Words a, Words b, Words* high, Words* low) {
  const uint64_t product = uint64_t{a.v} * b.v;
  *high = {static_cast<uint32_t>(product >> 32)};
  *low = {static_cast<uint32_t>(product)};
}

// Lane i: words[i] >= threshold ? value : 0
template <class C>
DLK_INLINE Vec<C> where_at_least(const uint32_t* words, uint32_t threshold, C value) {
  return {*words >= threshold ? value : C(0)};
}

// Lane i: bytes[i] ? 0 : -inf
template <class C>
DLK_INLINE Vec<C> bias_of_bools(const uint8_t* bytes) {
  return {*bytes ? C(0) : -std::numeric_limits<C>::infinity()};
}

DLK_ISA_END
