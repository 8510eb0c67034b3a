// Two vectors that go through the same arithmetic together. Code written for one Vec then gives
// the processor two independent chains of instructions; with one chain it would wait for the
// latency of each instruction.
#pragma once

#include <type_traits>

#include "simd/vector.h"

DLK_ISA_BEGIN

template <class V>
struct Pair {
  V a, b;

  static DLK_INLINE Pair zero() { return {V::zero(), V::zero()}; }
  template <class C>
  static DLK_INLINE Pair set1(C x) {
    return {V::set1(x), V::set1(x)};
  }
};

template <class V>
struct ElementOfVector;
template <class C>
struct ElementOfVector<Vec<C>> {
  using type = C;
};
template <class V>
struct ElementOfVector<Pair<V>> : ElementOfVector<V> {};
template <class V>
using ElementOf = typename ElementOfVector<V>::type;

// Converts one vector to W: to itself, or to a Pair that holds it twice.
template <class W, class V>
DLK_INLINE W spread(V x) {
  if constexpr (std::is_same_v<W, V>) {
    return x;
  } else {
    return {x, x};
  }
}

template <class V>
DLK_INLINE Pair<V> operator+(Pair<V> x, Pair<V> y) {
  return {x.a + y.a, x.b + y.b};
}
template <class V>
DLK_INLINE Pair<V> operator-(Pair<V> x, Pair<V> y) {
  return {x.a - y.a, x.b - y.b};
}
template <class V>
DLK_INLINE Pair<V> operator*(Pair<V> x, Pair<V> y) {
  return {x.a * y.a, x.b * y.b};
}
template <class V>
DLK_INLINE Pair<V> reciprocal(Pair<V> x) {
  return {reciprocal(x.a), reciprocal(x.b)};
}
template <class V>
DLK_INLINE Pair<V> quotient(Pair<V> x, Pair<V> y) {
  return {quotient(x.a, y.a), quotient(x.b, y.b)};
}
template <class V>
DLK_INLINE Pair<V> operator-(Pair<V> x) {
  return {-x.a, -x.b};
}
template <class V>
DLK_INLINE Pair<V> fma(Pair<V> x, Pair<V> y, Pair<V> z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}
template <class V>
DLK_INLINE Pair<V> fnma(Pair<V> x, Pair<V> y, Pair<V> z) {
  return {fnma(x.a, y.a, z.a), fnma(x.b, y.b, z.b)};
}
template <class V>
DLK_INLINE Pair<V> min(Pair<V> x, Pair<V> y) {
  return {min(x.a, y.a), min(x.b, y.b)};
}
template <class V>
DLK_INLINE Pair<V> max(Pair<V> x, Pair<V> y) {
  return {max(x.a, y.a), max(x.b, y.b)};
}
template <class V>
DLK_INLINE Pair<V> copysign(Pair<V> x, Pair<V> y) {
  return {copysign(x.a, y.a), copysign(x.b, y.b)};
}
template <class V>
DLK_INLINE Pair<V> reciprocal_of_normal(Pair<V> x) {
  return {reciprocal_of_normal(x.a), reciprocal_of_normal(x.b)};
}
template <class V>
DLK_INLINE Pair<V> above_floor(Pair<V> x) {
  return {above_floor(x.a), above_floor(x.b)};
}
template <class V>
DLK_INLINE Pair<V> scale_by_floor(Pair<V> x, Pair<V> y) {
  return {scale_by_floor(x.a, y.a), scale_by_floor(x.b, y.b)};
}
template <class V>
DLK_INLINE Pair<V> exponent_from_bits(Pair<V> x) {
  return {exponent_from_bits(x.a), exponent_from_bits(x.b)};
}

DLK_ISA_END
