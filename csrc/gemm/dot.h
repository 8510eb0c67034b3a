// The GEMV path: products of a few rows with weights that are not packed, [N][K] with k
// contiguous. Lane i of a result is a . w[i]. It pays for a few rows or a single time
// step. Its order of summation differs from that of tiles, so deterministic mode does not
// use it. Rows share the weights that are read: one row at a time, a GRU of 8 sequences and 63 MB of weights took five
// times as long.
#pragma once

#include "gemm/storage_access.h"

DLK_ISA_BEGIN

constexpr int kDotGroup = 4;  // most rows that share a read

template <class C, int kRows, class S>
DLK_INLINE void dot_vectors(const C* const* a, int64_t K, const S* w, int64_t ldw, int rows, Vec<C>* out) {
  using V = Vec<C>;
  constexpr int kSums = V::size < 8 ? 8 / V::size : 1;  // per row, so that no chain of roundings grows long
  constexpr int kWeights =
      V::size > kRows ? V::size / kRows : 1;  // rows of weights at once: all sums stay in registers
  V results[kRows][V::size];
  for (int first = 0; first < V::size; first += kWeights) {
    V acc[kSums][kRows][kWeights];
    const S* row[kWeights];
#pragma GCC unroll 16
    for (int i = 0; i < kWeights; ++i) {
      row[i] = w + (first + i < rows ? first + i : 0) * ldw;
#pragma GCC unroll 8
      for (int part = 0; part < kSums; ++part)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[part][r][i] = V::zero();
    }
    int64_t k = 0;
    for (; k + kSums * V::size <= K; k += kSums * V::size) {
#pragma GCC unroll 8
      for (int part = 0; part < kSums; ++part) {
        V x[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) x[r] = V::load(a[r] + k + part * V::size);
#pragma GCC unroll 16
        for (int i = 0; i < kWeights; ++i) {
          const V weights = load_as<C>(row[i] + k + part * V::size);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) acc[part][r][i] = fma(x[r], weights, acc[part][r][i]);
        }
      }
    }
    for (; k < K; k += V::size) {
      const int left = static_cast<int>(K - k < V::size ? K - k : V::size);
#pragma GCC unroll 16
      for (int i = 0; i < kWeights; ++i) {
        const V weights = load_as<C>(row[i] + k, left);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[0][r][i] = fma(V::load(a[r] + k, left), weights, acc[0][r][i]);
      }
    }
#pragma GCC unroll 8
    for (int half = kSums / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int part = 0; part < half; ++part)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
          for (int i = 0; i < kWeights; ++i) acc[part][r][i] = acc[part][r][i] + acc[part + half][r][i];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < kWeights; ++i) results[r][first + i] = acc[0][r][i];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) out[r] = reduce_rows<C>(results[r]);
}

template <class C, int kRows>
DLK_NOINLINE void dot_of_rows(const C* const* a, int64_t K, DType dtype, const void* w, int64_t first_row, int rows,
                              Vec<C>* out) {
  const int64_t skip = first_row * K;
  if constexpr (std::is_same_v<C, double>) {
    dot_vectors<C, kRows>(a, K, static_cast<const double*>(w) + skip, K, rows, out);
  } else {
    switch (dtype) {
      case DType::bf16:
        return dot_vectors<C, kRows>(a, K, static_cast<const bf16*>(w) + skip, K, rows, out);
      case DType::f16:
        return dot_vectors<C, kRows>(a, K, static_cast<const f16*>(w) + skip, K, rows, out);
      default:
        return dot_vectors<C, kRows>(a, K, static_cast<const float*>(w) + skip, K, rows, out);
    }
  }
}

// out[r] = a[r] times `rows` rows of w from first_row on, for each r < count <= kDotGroup.
template <class C>
DLK_INLINE void dot(int count, const C* const* a, int64_t K, DType dtype, const void* w, int64_t first_row, int rows,
                    Vec<C>* out) {
  int r = 0;
  for (; count - r >= 4; r += 4) dot_of_rows<C, 4>(a + r, K, dtype, w, first_row, rows, out + r);
  for (; count - r >= 2; r += 2) dot_of_rows<C, 2>(a + r, K, dtype, w, first_row, rows, out + r);
  if (r < count) dot_of_rows<C, 1>(a + r, K, dtype, w, first_row, rows, out + r);
}

DLK_ISA_END
