// Products of few query rows with keys (decode): a dot product for each key and row. The keys are read in place, in
// their own type, and all rows that share a key use it while it is in registers.
#pragma once

#include "attention/cpu/state.h"

DLK_ISA_BEGIN

// Rows that will be needed next and are prefetched meanwhile.
struct RowsAhead {
  const char* data;
  int64_t stride, bytes;  // of a row
  DLK_INLINE void fetch(int64_t row) const {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + row * stride + at, 0, 2);
  }
};

// scores[j][row] = q[row] . k[j] for kRows rows.
template <class C, int kRows, class S>
DLK_INLINE void dot_keys(const C* q, int64_t ldq, int64_t D, const S* k, int64_t ldk, int64_t keys, C* scores,
                         int64_t ld, const RowsAhead& ahead) {
  using V = Vec<C>;
  constexpr int kKeys = V::size / kRows;
  constexpr int kSums = V::size < 8 ? 8 / V::size : 1;  // of each dot product, so that no chain grows long
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int valid = static_cast<int>(std::min<int64_t>(kKeys, keys - j));
    for (int i = 0; i < valid; ++i) {
      ahead.fetch(j + i);
      for (int64_t x = 0; x < D; x += 64 / static_cast<int64_t>(sizeof(S)))
        __builtin_prefetch(k + (j + i + 2 * kKeys) * ldk + x);
    }
    V acc[kSums][V::size];
    const S* key[kKeys];
    DLK_UNROLL
    for (int i = 0; i < V::size; ++i) {
      DLK_UNROLL
      for (int part = 0; part < kSums; ++part) acc[part][i] = V::zero();
    }
    DLK_UNROLL
    for (int i = 0; i < kKeys; ++i) key[i] = k + (j + (i < valid ? i : 0)) * ldk;
    int64_t x = 0;
    for (; x + kSums * V::size <= D; x += kSums * V::size) {
      DLK_UNROLL
      for (int part = 0; part < kSums; ++part) {
        const int64_t at = x + part * V::size;
        V row[kRows];
        DLK_UNROLL
        for (int r = 0; r < kRows; ++r) row[r] = V::load(q + r * ldq + at);
        DLK_UNROLL
        for (int i = 0; i < kKeys; ++i) {
          const V value = load_as<C>(key[i] + at);
          DLK_UNROLL
          for (int r = 0; r < kRows; ++r) acc[part][i * kRows + r] = fma(value, row[r], acc[part][i * kRows + r]);
        }
      }
    }
    for (; x < D; x += V::size) {
      const int n = static_cast<int>(std::min<int64_t>(V::size, D - x));
      for (int i = 0; i < kKeys; ++i) {
        const V value = load_as<C>(key[i] + x, n);
        for (int r = 0; r < kRows; ++r)
          acc[0][i * kRows + r] = fma(value, V::load(q + r * ldq + x, n), acc[0][i * kRows + r]);
      }
    }
    DLK_UNROLL
    for (int i = 0; i < V::size; ++i) {
      DLK_UNROLL
      for (int part = 1; part < kSums; ++part) acc[0][i] = acc[0][i] + acc[part][i];
    }
    alignas(64) C sums[V::size];
    reduce_rows<C>(acc[0]).store(sums);
    for (int i = 0; i < valid; ++i)
      for (int r = 0; r < kRows; ++r) scores[(j + i) * ld + r] = sums[i * kRows + r];
  }
}

template <class C, class S>
DLK_NOINLINE void dot_rows(int64_t rows, const C* q, int64_t ldq, int64_t D, const S* k, int64_t ldk, int64_t keys,
                           C* scores, int64_t ld, const RowsAhead& ahead) {
  constexpr int kMost = Vec<C>::size < 4 ? Vec<C>::size : 4;
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) dot_keys<C, kMost>(q + r * ldq, ldq, D, k, ldk, keys, scores + r, ld, ahead);
  if constexpr (kMost > 2) {
    for (; r + 2 <= rows; r += 2) dot_keys<C, 2>(q + r * ldq, ldq, D, k, ldk, keys, scores + r, ld, ahead);
  }
  for (; r < rows; ++r) dot_keys<C, 1>(q + r * ldq, ldq, D, k, ldk, keys, scores + r, ld, ahead);
}

template <class C>
DLK_INLINE void dot_rows(DType dtype, int64_t rows, const C* q, int64_t ldq, int64_t D, const void* k, int64_t ldk,
                         int64_t keys, C* scores, int64_t ld, const RowsAhead& ahead) {
  if constexpr (std::is_same_v<C, double>) {
    dot_rows(rows, q, ldq, D, static_cast<const double*>(k), ldk, keys, scores, ld, ahead);
  } else {
    switch (dtype) {
      case DType::bf16:
        return dot_rows(rows, q, ldq, D, static_cast<const bf16*>(k), ldk, keys, scores, ld, ahead);
      case DType::f16:
        return dot_rows(rows, q, ldq, D, static_cast<const f16*>(k), ldk, keys, scores, ld, ahead);
      default:
        return dot_rows(rows, q, ldq, D, static_cast<const float*>(k), ldk, keys, scores, ld, ahead);
    }
  }
}

DLK_ISA_END
