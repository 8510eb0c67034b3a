// Functions that are the same for every Vec: storage conversions by type, and block transposes.
#pragma once

#include "simd/vector.h"

DLK_ISA_BEGIN

// Loads n elements of type S as lanes of type C; S is C, or bf16, f16 or (only whole vectors) int8_t with C = float.
template <class C, class S>
DLK_INLINE Vec<C> load_as(const S* p, int n) {
  if constexpr (sizeof(S) == sizeof(C)) {
    return Vec<C>::load(p, n);
  } else {
    return widen(p, n);
  }
}
template <class C, class S>
DLK_INLINE Vec<C> load_as(const S* p) {
  if constexpr (sizeof(S) == sizeof(C)) {
    return Vec<C>::load(p);
  } else {
    return widen(p);
  }
}

template <class S, class C>
DLK_INLINE void store_as(S* p, Vec<C> a, int n) {
  if constexpr (sizeof(S) == sizeof(C)) {
    a.store(p, n);
  } else {
    narrow(p, a, n);
  }
}
template <class S, class C>
DLK_INLINE void store_as(S* p, Vec<C> a) {
  if constexpr (sizeof(S) == sizeof(C)) {
    a.store(p);
  } else {
    narrow(p, a);
  }
}

// dst[c * dst_ld + r] = src[r * src_ld + c] for r < rows <= size, c < cols <= size. Each of the
// cols rows of dst is written over its full width, with 0 from lane `rows` on, as packing needs.
template <class C, class S>
inline void transpose_block(const S* src, ptrdiff_t src_ld, int rows, int cols, C* dst, ptrdiff_t dst_ld) {
  constexpr int size = Vec<C>::size;
  Vec<C> block[size];
  if (rows == size && cols == size) {
    DLK_UNROLL
    for (int r = 0; r < size; ++r) block[r] = load_as<C>(src + r * src_ld);
    transpose(block);
    DLK_UNROLL
    for (int c = 0; c < size; ++c) block[c].store(dst + c * dst_ld);
  } else {
    for (int r = 0; r < size; ++r) block[r] = r < rows ? load_as<C>(src + r * src_ld, cols) : Vec<C>::zero();
    transpose(block);
    for (int c = 0; c < cols; ++c) block[c].store(dst + c * dst_ld);
  }
}

DLK_ISA_END
