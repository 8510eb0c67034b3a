// Loads and stores of tensors in their storage dtype, as vectors of the compute type.
// The dtype is a run-time value. It costs a branch per vector, which always goes the same
// way, and saves a copy of every algorithm for each dtype.
#pragma once

#include <type_traits>

#include "simd/bf16_unit.h"
#include "simd/vec.h"

DLK_ISA_BEGIN

DLK_INLINE int64_t item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

DLK_INLINE const void* advance(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * item_size(dtype);
}

DLK_INLINE void* advance(void* p, DType dtype, int64_t elements) {
  return static_cast<char*>(p) + elements * item_size(dtype);
}

// n elements from p[at]; lanes from n on are 0.
template <class C>
DLK_INLINE Vec<C> load_any(DType dtype, const void* p, int64_t at, int n) {
  if constexpr (std::is_same_v<C, double>) {
    const double* from = static_cast<const double*>(p) + at;
    return n == Vec<C>::size ? Vec<C>::load(from) : Vec<C>::load(from, n);
  } else {
    if (dtype == DType::f32) {
      const float* from = static_cast<const float*>(p) + at;
      return n == Vec<C>::size ? Vec<C>::load(from) : Vec<C>::load(from, n);
    }
    if (dtype == DType::bf16) return load_as<C>(static_cast<const bf16*>(p) + at, n);
    return load_as<C>(static_cast<const f16*>(p) + at, n);
  }
}

template <class C>
DLK_INLINE void store_any(DType dtype, void* p, int64_t at, Vec<C> value, int n) {
  if constexpr (std::is_same_v<C, double>) {
    value.store(static_cast<double*>(p) + at, n);
  } else {
    if (dtype == DType::f32) {
      float* to = static_cast<float*>(p) + at;
      if (n == Vec<C>::size) {
        value.store(to);
      } else {
        value.store(to, n);
      }
    } else if (dtype == DType::bf16) {
      store_as(static_cast<bf16*>(p) + at, value, n);
    } else {
      store_as(static_cast<f16*>(p) + at, value, n);
    }
  }
}

// Loads and stores of vectors that are partial only at the end of a row.
template <class C>
DLK_INLINE Vec<C> load_part(const C* p, int n) {
  return n == Vec<C>::size ? Vec<C>::load(p) : Vec<C>::load(p, n);
}

template <class C>
DLK_INLINE void store_part(C* p, Vec<C> value, int n) {
  if (n == Vec<C>::size) {
    value.store(p);
  } else {
    value.store(p, n);
  }
}

// Copies p[0..n) to out, in the compute type; out must have room for n rounded up to whole vectors.
template <class C>
DLK_INLINE void load_row(DType dtype, const void* p, int64_t n, C* out) {
  constexpr int kSize = Vec<C>::size;
  for (int64_t j = 0; j < n; j += kSize)
    load_any<C>(dtype, p, j, static_cast<int>(n - j < kSize ? n - j : kSize)).store(out + j);
}

template <class C>
DLK_INLINE void store_row(DType dtype, void* p, int64_t n, const C* in) {
  constexpr int kSize = Vec<C>::size;
  for (int64_t j = 0; j < n; j += kSize) {
    const int m = static_cast<int>(n - j < kSize ? n - j : kSize);
    store_any<C>(dtype, p, j, Vec<C>::load(in + j, m), m);
  }
}

// Calls f with a zero of the dtype's compute type. Instruction sets with a Bf16Unit run only calls on bf16, and only
// layers of float32 have weights of fewer bits, so these need no code for double.
template <class F>
DLK_INLINE auto with_compute_type(DType dtype, F f) {
  if constexpr (!Bf16Unit::kPresent && kWeights == Weights::given) {
    if (dtype == DType::f64) return f(double());
  }
  return f(float());
}

template <class C>
DLK_INLINE bool is_compute_type(DType dtype) {
  return dtype == (std::is_same_v<C, double> ? DType::f64 : DType::f32);
}

DLK_ISA_END
