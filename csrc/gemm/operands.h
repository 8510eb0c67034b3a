// Converts rows of a tensor of any dtype to operands of products.
#pragma once

#include "gemm/tile.h"

DLK_ISA_BEGIN

// Whether products take values of this dtype without a conversion.
template <class C>
DLK_INLINE bool is_operand_type(DType dtype) {
  return kPairs ? dtype == DType::bf16 : is_compute_type<C>(dtype);
}

// Converts a row of n values to operands; out must have room for whole vectors of items.
template <class C>
DLK_INLINE void load_operands(DType dtype, const void* p, int64_t n, C* out) {
  constexpr int kSize = Vec<C>::size;
  if constexpr (kPairs) {
    if (dtype == DType::bf16) return load_row<C>(DType::f32, p, item_count(n), out);
    bf16* to = reinterpret_cast<bf16*>(out);
    for (int64_t j = 0; j < n; j += kSize)
      Unit<C>::round(load_any<C>(dtype, p, j, static_cast<int>(n - j < kSize ? n - j : kSize)), to + j);
  } else {
    load_row<C>(dtype, p, n, out);
  }
}

DLK_ISA_END
