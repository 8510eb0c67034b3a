// Layer normalisation of one row and zoneout of one vector.
#pragma once

#include <cmath>
#include <cstring>

#include "gemm/storage_access.h"
#include "rnn/variants.h"

DLK_ISA_BEGIN

template <class C>
struct Moments {
  C mean, scale;  // scale is 1 / sqrt(variance + eps)
};

// Calls act(j, n) for the vectors of `size` values, of which the last has n values and the others Vec::size.
template <class C, class Act>
DLK_INLINE void each_vector_of(int64_t size, Act act) {
  constexpr int kLanes = Vec<C>::size;
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) act(j, kLanes);
  if (j < size) act(j, static_cast<int>(size - j));
}

// The sum of term(j) over the vectors that are whole and of last(j) over the values behind them. The order depends on
// `size` alone.
template <class C, class Term, class Last>
DLK_INLINE C sum_of(int64_t size, Term term, Last last) {
  using V = Vec<C>;
  constexpr int kSums = 4;  // independent chains of additions
  V sums[kSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t j = 0;
  for (; j + kSums * V::size <= size; j += kSums * V::size) {
    DLK_UNROLL
    for (int k = 0; k < kSums; ++k) sums[k] = term(j + k * V::size, sums[k]);
  }
  for (; j + V::size <= size; j += V::size) sums[0] = term(j, sums[0]);
  C sum = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < size; ++j) sum += last(j);
  return sum;
}

// The variance is that of the values around their mean, not a difference of two large sums.
template <class C>
DLK_INLINE Moments<C> moments_of(const C* x, int64_t size, C eps) {
  using V = Vec<C>;
  const C mean = sum_of<C>(
                     size, [&](int64_t j, V sum) __attribute__((always_inline)) { return sum + V::load(x + j); },
                     [&](int64_t j) { return x[j]; }) /
                 static_cast<C>(size);
  const V centre = V::set1(mean);
  const C squares = sum_of<C>(
      size,
      [&](int64_t j, V sum) __attribute__((always_inline)) {
        const V from_mean = V::load(x + j) - centre;
        return fma(from_mean, from_mean, sum);
      },
      [&](int64_t j) { return (x[j] - mean) * (x[j] - mean); });
  return {mean, C(1) / std::sqrt(squares / static_cast<C>(size) + eps)};
}

// Replaces n values by their normalised ones times `gain` plus `bias`, and stores the normalised ones in `keep` unless
// it is null. Returns the scale.
template <class C>
DLK_INLINE C normalise(C* x, int64_t size, const C* gain, const C* bias, C eps, C* keep) {
  using V = Vec<C>;
  const Moments<C> of = moments_of(x, size, eps);
  const V mean = V::set1(of.mean), scale = V::set1(of.scale);
  each_vector_of<C>(size, [&](int64_t j, int n) __attribute__((always_inline)) {
    const V normalised = (load_part(x + j, n) - mean) * scale;
    if (keep) store_part(keep + j, normalised, n);
    store_part(x + j, fma(normalised, load_part(gain + j, n), load_part(bias + j, n)), n);
  });
  return of.scale;
}

// a * b, rounded. A compiler would contract the product with a difference that uses it, but not with the mean that is
// subtracted there, and what should cancel would leave a rounding error, times a scale of up to 1 / sqrt(eps).
template <class C>
DLK_INLINE Vec<C> rounded_product(Vec<C> a, Vec<C> b) {
  return fma(a, b, Vec<C>::zero());
}

// The gradient of normalise() for its input: from `out`, that of its result, to `to`.
template <class C>
DLK_INLINE void normalise_backward(const C* out, const C* gain, const C* normalised, int64_t size, C scale, C* to) {
  using V = Vec<C>;
  const C sum = sum_of<C>(
      size,
      [&](int64_t j, V total)
          __attribute__((always_inline)) { return fma(V::load(out + j), V::load(gain + j), total); },
      [&](int64_t j) { return out[j] * gain[j]; });
  const C along = sum_of<C>(
      size,
      [&](int64_t j, V total) __attribute__((always_inline)) {
        return fma(V::load(out + j) * V::load(gain + j), V::load(normalised + j), total);
      },
      [&](int64_t j) { return out[j] * gain[j] * normalised[j]; });
  const V mean = V::set1(sum / static_cast<C>(size)), slope = V::set1(along / static_cast<C>(size)),
          times = V::set1(scale);
  each_vector_of<C>(size, [&](int64_t j, int n) __attribute__((always_inline)) {
    const V d = rounded_product(load_part(out + j, n), load_part(gain + j, n)) - mean;
    store_part(to + j, fnma(load_part(normalised + j, n), slope, d) * times, n);
  });
}

// The sizes of the parts of G*H values that are normalised together: all of the lstm's, the gru's r and z, and its n.
template <class Cell, class Act>
DLK_INLINE void each_normalised_part(int64_t H, Act act) {
  if constexpr (Cell::kHasPartedGate) {
    act(0, int64_t{0}, Cell::kPartedGate * H);
    act(1, Cell::kPartedGate * H, H);
  } else {
    act(0, int64_t{0}, Cell::kGates * H);
  }
}

// Which part of a state keeps its old value: the mask of one row, or a rate.
template <class C>
struct Zoneout {
  using V = Vec<C>;
  const uint8_t* mask;
  C rate;

  DLK_INLINE V apply(int64_t j, int n, V old_value, V new_value) const {
    if (mask) return select(j, n, old_value, new_value);
    if (rate == C(0)) return new_value;
    const V keep = V::set1(rate);
    return fma(keep, old_value, (V::set1(1) - keep) * new_value);
  }
  // Divides the gradient of the result into those of the old and of the new value.
  DLK_INLINE void divide(int64_t j, int n, V gradient, V* of_old, V* of_new) const {
    const V keep = V::set1(rate);
    *of_old = mask ? select(j, n, gradient, V::zero()) : rate == C(0) ? V::zero() : keep * gradient;
    *of_new = mask ? select(j, n, V::zero(), gradient) : rate == C(0) ? gradient : (V::set1(1) - keep) * gradient;
  }

 private:
  // `kept` where the mask is true, else `other`: exact, whatever the values are.
  DLK_INLINE V select(int64_t j, int n, V kept, V other) const {
    if (n == V::size) return select_lt(bias_of_bools<C>(mask + j), V::zero(), other, kept);
    uint8_t bytes[V::size] = {};
    std::memcpy(bytes, mask + j, static_cast<size_t>(n));
    return select_lt(bias_of_bools<C>(bytes), V::zero(), other, kept);
  }
};

DLK_ISA_END
