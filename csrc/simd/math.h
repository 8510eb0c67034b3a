// exp, Exp2Down, sigmoid, tanh and relu over Vec or Pair, written once for
// every ISA. Where all products take pairs of bf16 (kPairs), sigmoid and tanh are rough.
//
// y = n ln2 + r with |r| <= ln2 / 2, and e^y = 2^n (1 + p), p = expm1(r) by a
// polynomial. Keeping 2^n and p apart lets sigmoid and tanh add their own 1 to
// 2^n, exactly, so that each ends in one fma and one division, and tanh stays
// relatively exact near 0 without a second branch.
//
// p = r + r^2 / 2 + r^3 q(r). The coefficients of q are our own minimax fit
// (Remez exchange) of the error relative to expm1: 1.4e-8 for float, 2.4e-17 for
// double. ln2 is split so that n * ln2_hi is exact (Cody and Waite) also where
// there is no fma.
#pragma once

#include "simd/vector.h"
#include "simd/pair.h"

DLK_ISA_BEGIN

template <class C>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float shift = 0x1.8p23f + 127.0f;  // adding it rounds to an integer with the bias of an exponent
  static constexpr float n_max = 127.0f;
  static constexpr float normal_min = -87.0f;  // above it e^y is normal
  static constexpr float tanh_min = -20.0f;    // tanh(y / 2) rounds to -1 from here down
  static constexpr float underflow = -104.0f, overflow = 89.0f;
  static constexpr float ln2_hi = 0x1.63p-1f, ln2_lo = -2.12194440054690583e-4f;
};

template <>
struct ExpConstants<double> {
  static constexpr double shift = 0x1.8p52 + 1023.0;
  static constexpr double n_max = 1023.0;
  static constexpr double normal_min = -708.0;
  static constexpr double tanh_min = -40.0;
  static constexpr double underflow = -746.0, overflow = 710.0;
  static constexpr double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
};

template <class V>
DLK_INLINE V expm1_reduced(V r, float) {
  const V r2 = r * r;
  const V q56 = fma(V::set1(1.38982257e-3f), r, V::set1(8.36604089e-3f));
  const V q34 = fma(V::set1(4.16668542e-2f), r, V::set1(1.66665494e-1f));
  const V q = fma(q56, r2, q34);
  return fma(fma(q, r, V::set1(0.5f)), r2, r);
}

template <class V>
DLK_INLINE V expm1_reduced(V r, double) {
  const V r2 = r * r;
  const V q34 = fma(V::set1(0.04166666666662), r, V::set1(0.16666666666666602));
  const V q56 = fma(V::set1(0.0013888888920499498), r, V::set1(0.008333333333388383));
  const V q78 = fma(V::set1(2.4801516361663004e-05), r, V::set1(0.00019841269709358478));
  const V q9a = fma(V::set1(2.762222098401339e-07), r, V::set1(2.7557425052108367e-06));
  V q = fma(V::set1(2.5045911110792872e-08), r2, q9a);
  q = fma(q, r2, q78);
  q = fma(q, r2, q56);
  q = fma(q, r2, q34);
  return fma(fma(q, r, V::set1(0.5)), r2, r);
}

// e^y = scale * (1 + p)
template <class V>
struct ExpParts {
  V scale, p;
};

// y must be >= normal_min or NaN. Where n is limited to n_max, r and p keep growing with y, so that e^y overflows as it
// should.
template <class V>
DLK_INLINE ExpParts<V> exp_parts(V y) {
  using C = ElementOf<V>;
  using K = ExpConstants<C>;
  const V shift = V::set1(K::shift);
  const V shifted = min(fma(y, V::set1(C(1.4426950408889634)), shift), V::set1(K::shift + K::n_max));
  const V n = shifted - shift;
  const V r = fnma(n, V::set1(K::ln2_lo), fnma(n, V::set1(K::ln2_hi), y));
  return {exponent_from_bits(shifted), expm1_reduced(r, C())};
}

template <class V>
DLK_INLINE V exp(V x) {
  using C = ElementOf<V>;
  using K = ExpConstants<C>;
  // 2^n is applied as two factors with half of n each, so that both are normal even where the result is subnormal.
  const V y = min(V::set1(K::overflow), max(V::set1(K::underflow), x));
  const V shift = V::set1(K::shift);
  const V n = fma(y, V::set1(C(1.4426950408889634)), shift) - shift;
  const V r = fnma(n, V::set1(K::ln2_lo), fnma(n, V::set1(K::ln2_hi), y));
  const V half = fma(n, V::set1(C(0.5)), shift);
  const V rest = n - (half - shift) + shift;
  const V scale = exponent_from_bits(half);
  return fma(scale, expm1_reduced(r, C()), scale) * exponent_from_bits(rest);
}

// Computes 2^(factor x) for a factor > 0 and products factor x up to about 0 (n_max at most). The result is exactly 1
// at x = 0, 0 where it would not be normal, and NaN for NaN. kRough is for results that are rounded to 16 bits in the
// end: it is within 3e-6, by a shorter polynomial, our own minimax fit (by linear programming) of the error relative to
// 2^-r.
template <class C, bool kRough = false>
struct Exp2Down {
  using V = Vec<C>;
  using K = ExpConstants<C>;
  V factor, least;

  DLK_INLINE explicit Exp2Down(C times) : factor(V::set1(times)), least(V::set1(-K::n_max / times)) {}

  // W is a Vec or a Pair.
  template <class W>
  DLK_INLINE W operator()(W x) const {
    const W y = max(spread<W>(least), x), times = spread<W>(factor), shift = W::set1(K::shift);
    const W shifted = fma(y, times, shift);
    const W scale = exponent_from_bits(shifted);
    const W minus_r = fnma(y, times, shifted - shift);
    if constexpr (kRough) {
      const W p =
          fma(fma(W::set1(C(-0.00958538242)), minus_r, W::set1(C(0.0559066273))), minus_r, W::set1(C(-0.24024038)));
      return fnma(fma(p, minus_r, W::set1(C(0.693124175))), minus_r, W::set1(C(1))) * scale;
    }
    return fma(scale, expm1_reduced(minus_r * W::set1(C(-0.6931471805599453)), C()), scale);
  }
};

// sigmoid and tanh for states that are rounded to bf16 in the end, whose last bit is 2^-9: their relative errors are
// within 3e-6 (and 1e-7 |x| more where sigmoid is tiny) and 7e-6. They take 12 and 14 instructions where the exact ones
// take 20 and 25, and the exact ones took half of the time of an lstm whose products AMX makes. The polynomials are our
// own minimax fits, by linear programming, of the relative error of 2^r over [0, 1) and of x P(x^2) / Q(x^2) over [0,
// 9], beyond which tanh(x) is 1.
template <class V>
DLK_INLINE V rough_sigmoid(V x) {
  const V one = V::set1(1.0f);
  const V y = x * V::set1(-1.44269504f);
  const V r = above_floor(y);
  V p = fma(V::set1(0.0135375559f), r, V::set1(0.0520044528f));
  p = fma(fma(fma(p, r, V::set1(0.241447479f)), r, V::set1(0.693002701f)), r, V::set1(1.00000262f));
  return reciprocal(scale_by_floor(p, y) + one);
}
template <class V>
DLK_INLINE V rough_tanh(V x) {
  const V y = min(V::set1(9.0f), max(V::set1(-9.0f), x)), u = y * y;
  V p = fma(V::set1(3.02118337e-6f), u, V::set1(0.00206612633f)),
    q = fma(V::set1(0.000120321318f), u, V::set1(0.0200645961f));
  p = fma(fma(p, u, V::set1(0.12057545f)), u, V::set1(0.999994099f));
  q = fma(fma(q, u, V::set1(0.453870863f)), u, V::set1(1.0f));
  return y * p * reciprocal_of_normal(q);
}

template <class V>
DLK_INLINE V sigmoid(V x) {
  if constexpr (kPairs) return rough_sigmoid(x);
  using C = ElementOf<V>;
  const V one = V::set1(C(1));
  const ExpParts<V> e = exp_parts(-min(V::set1(-ExpConstants<C>::normal_min), x));
  return reciprocal(fma(e.scale, e.p, e.scale + one));
}

// expm1(2x) / (expm1(2x) + 2), computed at -|x|, where e^2x + 1 is rounded with the least error. The sign is set at the
// end, so the function is odd to the last bit.
template <class V>
DLK_INLINE V tanh(V x) {
  if constexpr (kPairs) return rough_tanh(x);
  using C = ElementOf<V>;
  const V one = V::set1(C(1));
  const V y = max(V::set1(ExpConstants<C>::tanh_min), copysign(x + x, -one));
  const ExpParts<V> e = exp_parts(y);
  return copysign(quotient(fma(e.scale, e.p, e.scale - one), fma(e.scale, e.p, e.scale + one)), x);
}

// NaN stays NaN, as in torch.
template <class V>
DLK_INLINE V relu(V x) {
  return max(V::zero(), x);
}

DLK_ISA_END
