// The GEMV path: products of one row with weights that are not packed, [N][K] with k
// contiguous. Lane i of the result is a . w[i]. It pays for a single row or a single time
// step. Its order of summation differs from that of tiles, so deterministic mode does not
// use it.
#pragma once

#include "gemm/storage_access.h"

DLK_ISA_BEGIN

template <class C, class S>
DLK_INLINE Vec<C> dot_vector(const C* a, int64_t K, const S* w, int64_t ldw, int rows) {
  using V = Vec<C>;
  constexpr int kSums = V::size < 8 ? 8 / V::size : 1;  // per row, so that no chain of roundings grows long
  V acc[kSums][V::size];
  const S* row[V::size];
#pragma GCC unroll 16
  for (int i = 0; i < V::size; ++i) {
    row[i] = w + (i < rows ? i : 0) * ldw;
#pragma GCC unroll 8
    for (int part = 0; part < kSums; ++part) acc[part][i] = V::zero();
  }
  int64_t k = 0;
  for (; k + kSums * V::size <= K; k += kSums * V::size) {
#pragma GCC unroll 8
    for (int part = 0; part < kSums; ++part) {
      const V x = V::load(a + k + part * V::size);
#pragma GCC unroll 16
      for (int i = 0; i < V::size; ++i) acc[part][i] = fma(x, load_as<C>(row[i] + k + part * V::size), acc[part][i]);
    }
  }
  for (; k < K; k += V::size) {
    const int left = static_cast<int>(K - k < V::size ? K - k : V::size);
    const V x = V::load(a + k, left);
#pragma GCC unroll 16
    for (int i = 0; i < V::size; ++i) acc[0][i] = fma(x, load_as<C>(row[i] + k, left), acc[0][i]);
  }
#pragma GCC unroll 8
  for (int half = kSums / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int part = 0; part < half; ++part)
#pragma GCC unroll 16
      for (int i = 0; i < V::size; ++i) acc[part][i] = acc[part][i] + acc[part + half][i];
  return reduce_rows<C>(acc[0]);
}

template <class C>
DLK_NOINLINE Vec<C> dot(const C* a, int64_t K, DType dtype, const void* w, int64_t first_row, int rows) {
  const int64_t skip = first_row * K;
  if constexpr (std::is_same_v<C, double>) {
    return dot_vector(a, K, static_cast<const double*>(w) + skip, K, rows);
  } else {
    switch (dtype) {
      case DType::bf16:
        return dot_vector(a, K, static_cast<const bf16*>(w) + skip, K, rows);
      case DType::f16:
        return dot_vector(a, K, static_cast<const f16*>(w) + skip, K, rows);
      default:
        return dot_vector(a, K, static_cast<const float*>(w) + skip, K, rows);
    }
  }
}

DLK_ISA_END
