// Products of bf16 by AVX512_BF16. vdpbf16ps adds two products to each of 16 sums: those of a pair of the sum's row,
// which is broadcast, and a pair of its column. It adds the product of the odd values, then that of the even ones, and
// rounds after each; denormal operands and results count as 0. It takes as long as an fma and does twice the work.
#pragma once

#ifndef DLK_ISA
#define DLK_ISA avx512_bf16
#endif
#include "simd/bf16_pairs.h"

DLK_ISA_BEGIN

struct Bf16Unit : Bf16Pairs {
  static constexpr bool kPresent = true;
  static constexpr int kRows = 1, kDepth = 2;  // products have a multiple of kRows rows, of a multiple of kDepth values
  struct Session {
    Session() {}
  };

  using Bf16Pairs::pairs;
#ifdef DLK_EMULATE_BF16
  static DLK_INLINE Vec<float> pairs(Vec<float> a, Vec<float> b) { return Bf16Pairs::pairs(normal(a), normal(b)); }
  static DLK_NOINLINE void round(Vec<float> a, bf16* to) { narrow(to, normal(a)); }
  static DLK_NOINLINE Vec<float> dot(Vec<float> a, Vec<float> b, Vec<float> sum) {
    uint32_t x[kSize], y[kSize];
    float sums[kSize];
    std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y), sum.store(sums);
    for (int i = 0; i < kSize; ++i)
      for (int half = 1; half >= 0; --half)
        sums[i] = Bf16Emulation::fused(Bf16Emulation::value(x[i], half), Bf16Emulation::value(y[i], half),
                                       Bf16Emulation::normal(sums[i]));
    return Vec<float>::load(sums);
  }
#else
  // Rounds two vectors; the even values are those of a, the odd ones those of b.
  static DLK_INLINE Vec<float> pairs(Vec<float> a, Vec<float> b) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
    const __m512i even = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i odd = _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(16)), 16);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_or_si512(even, odd), halves))};
  }
  static DLK_INLINE void round(Vec<float> a, bf16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(a.v));
  }
  static DLK_INLINE Vec<float> dot(Vec<float> a, Vec<float> b, Vec<float> sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
#endif

  // out [rows][columns] (+)= a b, where b holds pairs, [depth / 2][columns]. Each element is summed in the order of the
  // depth, from 0, and then stored or added to out. `columns` is a multiple of the vector's size.
  static DLK_NOINLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const bf16* a, int64_t lda,
                                    const float* b, int64_t ldb, float* out, int64_t ldo, bool accumulate) {
    while (columns > 0) {
      const int64_t vectors = columns / kSize;
      const int strip = vectors == 4 ? 2 : static_cast<int>(vectors < 3 ? vectors : 3);
      if (strip == 3) {
        multiply_strip<3>(rows, depth, a, lda, b, ldb, out, ldo, accumulate);
      } else if (strip == 2) {
        multiply_strip<2>(rows, depth, a, lda, b, ldb, out, ldo, accumulate);
      } else {
        multiply_strip<1>(rows, depth, a, lda, b, ldb, out, ldo, accumulate);
      }
      b += strip * kSize, out += strip * kSize, columns -= strip * kSize;
    }
  }

  // Returns for each lane the sum of a(x) b(x) over x < width, in the order of multiply(). a and b return vectors of
  // bf16 values.
  template <class A, class B>
  static DLK_INLINE Vec<float> diagonal(int64_t width, A a, B b) {
    const auto pair = [&](const auto& of, int64_t x) __attribute__((always_inline)) {
      return pairs(of(x), x + 1 < width ? of(x + 1) : Vec<float>::zero());
    };
    Vec<float> sum = Vec<float>::zero();
    for (int64_t x = 0; x < width; x += 2) sum = dot(pair(a, x), pair(b, x), sum);
    return sum;
  }

 private:
  using Tile = void (*)(int64_t depth, const bf16* a, int64_t lda, const float* b, int64_t ldb, float* out, int64_t ldo,
                        bool accumulate);
  // At most 24 sums: together with the columns and a row's pair they fill the registers.
  template <int kVectors>
  static constexpr int kTallest = kVectors == 1 ? 12 : 24 / kVectors;

  template <int kVectors>
  static DLK_INLINE void multiply_strip(int64_t rows, int64_t depth, const bf16* a, int64_t lda, const float* b,
                                        int64_t ldb, float* out, int64_t ldo, bool accumulate) {
    while (rows > 0) {  // tiles of nearly equal height
      const int64_t tiles = (rows + kTallest<kVectors> - 1) / kTallest<kVectors>, height = (rows + tiles - 1) / tiles;
      pick<kVectors>(height, std::make_integer_sequence<int, kTallest<kVectors>>{})(depth, a, lda, b, ldb, out, ldo,
                                                                                    accumulate);
      a += height * lda, out += height * ldo, rows -= height;
    }
  }

  template <int kVectors, int... kHeight>
  static DLK_INLINE Tile pick(int64_t height, std::integer_sequence<int, kHeight...>) {
    static constexpr Tile kTable[] = {tile<kHeight + 1, kVectors>...};
    return kTable[height - 1];
  }

  template <int kHeight, int kVectors>
  static DLK_NOINLINE void tile(int64_t depth, const bf16* a, int64_t lda, const float* b, int64_t ldb, float* out,
                                int64_t ldo, bool accumulate) {
    using V = Vec<float>;
    const bf16* row[kHeight];
    V sum[kHeight][kVectors];
    DLK_UNROLL
    for (int r = 0; r < kHeight; ++r) {
      row[r] = a + r * lda + depth;
      DLK_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
    }
    for (int64_t k = -depth; k != 0; k += 2, b += ldb) {
      V column[kVectors];
      DLK_UNROLL
      for (int v = 0; v < kVectors; ++v) column[v] = V::load(b + v * V::size);
      DLK_UNROLL
      for (int r = 0; r < kHeight; ++r) {
        float pair;
        std::memcpy(&pair, row[r] + k, sizeof pair);
        const V x = V::set1(pair);
        DLK_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[r][v] = dot(x, column[v], sum[r][v]);
      }
    }
    DLK_UNROLL
    for (int r = 0; r < kHeight; ++r) {
      DLK_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + r * ldo + v * V::size;
        (accumulate ? V::load(to) + sum[r][v] : sum[r][v]).store(to);
      }
    }
  }
};

DLK_ISA_END
