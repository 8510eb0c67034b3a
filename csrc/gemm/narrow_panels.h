// Packs panels whose values have fewer bits than the float32 weights that they are made from. Prepacking is the only
// user, so this need not be fast.
#pragma once

#include "gemm/panels.h"

DLK_ISA_BEGIN

// What makes the products of one column of int8 weights those of its float32 weights.
struct ColumnScales {
  float* scale;  // a weight is about its int8 value times this
  int32_t* sum;  // with kQuads: 128 times the sum of the column, which unsigned operands add to each product
};

// Rounds n weights to multiples of the returned scale; put(k, multiple) gets each. The greatest multiple is 127. The
// scale is NaN if a weight is not finite.
template <class Put>
DLK_INLINE float round_weights(const float* from, int64_t n, Put put) {
  constexpr float kMost = 127, kLeast = 1e-35f;
  float largest = 0;
  bool finite = true;
  for (int64_t k = 0; k < n; ++k) {
    finite = finite && std::isfinite(from[k]);
    largest = std::max(largest, std::fabs(from[k]));
  }
  const bool zero = !finite || largest < kLeast;
  for (int64_t k = 0; k < n; ++k) put(k, zero ? 0 : static_cast<int>(std::lrintf(from[k] * (kMost / largest))));
  return !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0 : largest / kMost;
}

// Packs panel p from w [columns][values]; `scales` belong to all columns of the matrix and are for int8 alone.
template <class C>
DLK_NOINLINE void pack_panel_narrow(const PanelShape& shape, int64_t p, const float* w, const ColumnScales& scales,
                                    Stored<C>* panel) {
  const int vectors = shape.vectors_in(p);
  std::fill_n(panel, shape.K * vectors * shape.lanes, Stored<C>{});
  for (int v = 0; v < vectors; ++v)
    for (int i = 0; i < shape.valid(p, v); ++i) {
      const int64_t column = shape.column(p, v) + i;
      const float* const from = w + column * shape.segment;
      if constexpr (kWeights == Weights::bf16) {
        for (int64_t k = 0; k < shape.segment; ++k) panel[shape.element(vectors, k, v) + i] = to_bf16(from[k]);
      } else {
        int32_t sum = 0;
        scales.scale[column] = round_weights(from, shape.segment, [&](int64_t k, int multiple) {
          // A quad is stored as a float's bits.
          auto* item = reinterpret_cast<int8_t*>(panel + shape.element(vectors, k / kItemValues, v) + i);
          item[k % kItemValues] = static_cast<int8_t>(multiple);
          sum += multiple;
        });
        if constexpr (kQuads) scales.sum[column] = sum * 128;
      }
    }
}

DLK_ISA_END
