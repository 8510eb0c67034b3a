// Converts rows of a tensor of any dtype to operands of products.
#pragma once

#include <algorithm>

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
    const int64_t values = item_count(n) * kItemValues;
    const auto left = [&](int64_t j, int most) { return static_cast<int>(std::clamp<int64_t>(n - j, 0, most)); };
    if (dtype == DType::bf16) {
      const bf16* const from = static_cast<const bf16*>(p);
      for (int64_t j = 0; j < values; j += 2 * kSize) Unit<C>::pairs(from + j, left(j, 2 * kSize)).store(out + j / 2);
      return;
    }
    bf16* to = reinterpret_cast<bf16*>(out);
    for (int64_t j = 0; j < values; j += kSize) Unit<C>::round(load_any<C>(dtype, p, j, left(j, kSize)), to + j);
  } else {
    load_row<C>(dtype, p, n, out);
  }
}

// Stores n values as operands. Without pairs the whole vector is stored.
template <class C>
DLK_INLINE void store_operands(Operand<C>* to, Vec<C> value, int n) {
  if constexpr (kPairs) {
    if (n == Vec<C>::size) {
      Unit<C>::round(value, to);
    } else {
      store_as(to, value, n);
    }
  } else {
    value.store(to);
  }
}

DLK_ISA_END
