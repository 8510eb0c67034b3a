// Products of bf16 by the matrix unit AMX, which has eight tile registers. Tiles 0 to 3 hold sums, 16 x 16 floats each,
// arranged two by two. Tiles 4 and 5 hold rows of the left operand, 16 rows of 32 values each. Tiles 6 and 7 hold
// columns of the right operand, 16 columns of 16 pairs each, [pair][column]. Products of int8 have quads in place of
// pairs and int32 sums (int8_quads.h). multiply_add adds to each sum the product of its row and its column. Strides of
// TileRegisters are in bytes.
//
// With DLK_EMULATE_BF16 plain C++ computes the same bits, and stops the program if no Session is open.
#pragma once

#ifndef DLK_ISA
#define DLK_ISA amx
#endif
#include "simd/bf16_pairs.h"
#include "simd/int8_quads.h"

DLK_ISA_BEGIN

#ifdef DLK_EMULATE_BF16

class TileRegisters {
 public:
  using Shapes = bool;  // whether any are configured
  static void open(Shapes* before) { *before = mine().configured, mine().configured = true; }
  static void close(const Shapes& before) { mine().configured = before; }

  template <int kTile>
  static void zero() {
    std::memset(tile(kTile), 0, sizeof(Tile));
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(tile(kTile)[r], static_cast<const char*>(from) + r * stride, 64);
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(kTile)[r], 64);
  }
  // The products of even values and those of odd values are summed separately, in order, each from 0.
  template <int kSums, int kRows, int kColumns, bool kInt8 = false>
  static void multiply_add() {
    if constexpr (kInt8) {
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c)
          for (int q = 0; q < 16; ++q)
            tile(kSums)[r][c] = Int8Emulation::dot(tile(kRows)[r][q], tile(kColumns)[q][c], tile(kSums)[r][c]);
      return;
    }
    using E = Bf16Emulation;
    for (int r = 0; r < 16; ++r) {
      float parts[2][16] = {};
      for (int p = 0; p < 16; ++p)
        for (int c = 0; c < 16; ++c)
          for (int half = 0; half < 2; ++half) {
            const float x = E::value(tile(kRows)[r][p], half), y = E::value(tile(kColumns)[p][c], half);
            parts[half][c] = E::fused(x, y, parts[half][c]);
          }
      for (int c = 0; c < 16; ++c) {
        uint32_t& sum = tile(kSums)[r][c];
        sum = float_bits(E::normal(E::normal(bits_float(sum)) + E::normal(parts[0][c] + parts[1][c])));
      }
    }
  }

 private:
  using Tile = uint32_t[16][16];
  struct State {
    Tile tiles[8];
    bool configured = false;
  };
  static State& mine() {
    static thread_local State state;
    return state;
  }
  static Tile& tile(int index) {
    if (!mine().configured) __builtin_trap();
    return mine().tiles[index];
  }
};

#else

// The intrinsics require the numbers of their tiles as literals.
struct TileRegisters {
  struct alignas(64) Shapes {
    uint8_t bytes[64];  // the first is the palette, 0 if no shapes are configured
  };
  static DLK_INLINE void open(Shapes* before) {
    // Palette 1, eight tiles of 64 bytes by 16 rows.
    static constexpr Shapes kShapes = {
        {1,  0, 0,  0, 0,  0, 0,  0, 0,  0,  0,  0,  0,  0,  0,  0,                           //
         64, 0, 64, 0, 64, 0, 64, 0, 64, 0,  64, 0,  64, 0,  64, 0,  0, 0, 0, 0, 0, 0, 0, 0,  //
         0,  0, 0,  0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0}};
    _tile_storeconfig(before->bytes);
    asm volatile("" ::: "memory");  // GCC's intrinsics declare only 8 of the bytes that they access
    _tile_loadconfig(kShapes.bytes);
  }
  static DLK_INLINE void close(const Shapes& before) {
    asm volatile("" ::: "memory");
    if (before.bytes[0]) {
      _tile_loadconfig(before.bytes);
    } else {
      _tile_release();
    }
  }
  template <int kTile>
  static DLK_INLINE void zero() {
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
  }
  template <int kTile>
  static DLK_INLINE void load(const void* from, int64_t stride) {
    asm volatile("" ::: "memory");  // GCC's intrinsic does not declare that it reads memory
    if constexpr (kTile == 0) _tile_loadd(0, from, stride);
    if constexpr (kTile == 1) _tile_loadd(1, from, stride);
    if constexpr (kTile == 2) _tile_loadd(2, from, stride);
    if constexpr (kTile == 3) _tile_loadd(3, from, stride);
    if constexpr (kTile == 4) _tile_loadd(4, from, stride);
    if constexpr (kTile == 5) _tile_loadd(5, from, stride);
    if constexpr (kTile == 6) _tile_loadd(6, from, stride);
    if constexpr (kTile == 7) _tile_loadd(7, from, stride);
  }
  template <int kTile>
  static DLK_INLINE void store(void* to, int64_t stride) {
    if constexpr (kTile == 0) _tile_stored(0, to, stride);
    if constexpr (kTile == 1) _tile_stored(1, to, stride);
    if constexpr (kTile == 2) _tile_stored(2, to, stride);
    if constexpr (kTile == 3) _tile_stored(3, to, stride);
  }
  template <int kSums, int kRows, int kColumns, bool kInt8 = false>
  static DLK_INLINE void multiply_add() {
    if constexpr (kInt8) {
      if constexpr (kSums == 0) _tile_dpbusd(0, 4, 6);
      if constexpr (kSums == 1) _tile_dpbusd(1, 4, 7);
      if constexpr (kSums == 2 && kRows == 5) _tile_dpbusd(2, 5, 6);
      if constexpr (kSums == 3 && kRows == 5) _tile_dpbusd(3, 5, 7);
      if constexpr (kSums == 2 && kRows == 4) _tile_dpbusd(2, 4, 5);
      if constexpr (kSums == 3 && kRows == 4) _tile_dpbusd(3, 4, 6);
      return;
    }
    if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSums == 2 && kRows == 5) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSums == 3 && kRows == 5) _tile_dpbf16ps(3, 5, 7);
    if constexpr (kSums == 2 && kRows == 4) _tile_dpbf16ps(2, 4, 5);
    if constexpr (kSums == 3 && kRows == 4) _tile_dpbf16ps(3, 4, 6);
  }
};

#endif

struct Bf16Unit : Bf16Pairs {
  static constexpr bool kPresent = true;
  // Denormal numbers become 0, as which products take them anyway.
#ifdef DLK_EMULATE_BF16
  static DLK_NOINLINE void round(Vec<float> a, bf16* to) { narrow(to, normal(a)); }
#else
  static DLK_INLINE void round(Vec<float> a, bf16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(a.v));
  }
#endif
  static constexpr int kRows = 16, kDepth = 32;  // of a tile of rows; a tile of columns has kRows columns

  // Configures the tiles' shapes for the calling thread; nothing else may configure them while a Session exists. Its
  // destructor restores the shapes of other libraries, because some keep theirs configured from call to call.
  class Session {
   public:
    DLK_NOINLINE Session() { TileRegisters::open(&before_); }
    DLK_NOINLINE ~Session() { TileRegisters::close(before_); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    TileRegisters::Shapes before_;
  };

  // In the functions that follow, kI by kJ of the 2 by 2 tiles of sums take part.
  template <int kI, int kJ>
  static DLK_INLINE void zero_sums() {
    TileRegisters::zero<0>();
    if constexpr (kJ == 2) TileRegisters::zero<1>();
    if constexpr (kI == 2) TileRegisters::zero<2>();
    if constexpr (kI == 2 && kJ == 2) TileRegisters::zero<3>();
  }
  template <int kI, int kJ>
  static DLK_INLINE void load_sums(const float* from, int64_t stride) {
    TileRegisters::load<0>(from, stride);
    if constexpr (kJ == 2) TileRegisters::load<1>(from + kSize, stride);
    if constexpr (kI == 2) TileRegisters::load<2>(below(from, stride), stride);
    if constexpr (kI == 2 && kJ == 2) TileRegisters::load<3>(below(from + kSize, stride), stride);
  }
  template <int kI, int kJ>
  static DLK_INLINE void store_sums(float* to, int64_t stride) {
    TileRegisters::store<0>(to, stride);
    if constexpr (kJ == 2) TileRegisters::store<1>(to + kSize, stride);
    if constexpr (kI == 2) TileRegisters::store<2>(below(to, stride), stride);
    if constexpr (kI == 2 && kJ == 2) TileRegisters::store<3>(below(to + kSize, stride), stride);
  }
  template <int kI, class Item>
  static DLK_INLINE void load_rows(const Item* from, int64_t stride) {
    TileRegisters::load<4>(from, stride);
    if constexpr (kI == 2) TileRegisters::load<5>(below(from, stride), stride);
  }
  template <int kJ>
  static DLK_INLINE void load_columns(const float* from, int64_t stride) {
    TileRegisters::load<6>(from, stride);
    if constexpr (kJ == 2) TileRegisters::load<7>(from + kSize, stride);
  }
  template <int kI, int kJ, bool kInt8 = false>
  static DLK_INLINE void multiply_add() {
    TileRegisters::multiply_add<0, 4, 6, kInt8>();
    if constexpr (kJ == 2) TileRegisters::multiply_add<1, 4, 7, kInt8>();
    if constexpr (kI == 2) TileRegisters::multiply_add<2, 5, 6, kInt8>();
    if constexpr (kI == 2 && kJ == 2) TileRegisters::multiply_add<3, 5, 7, kInt8>();
  }

  // out [rows][columns] (+)= a b, where b holds pairs, [depth / 2][columns]; rows, columns and depth are whole tiles.
  static DLK_NOINLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const bf16* a, int64_t lda,
                                    const float* b, int64_t ldb, float* out, int64_t ldo, bool accumulate) {
    for (int64_t r = 0; r < rows; r += 2 * kSize)
      for (int64_t c = 0; c < columns; c += 2 * kSize) {
        const bf16* at = a + r * lda;
        float* to = out + r * ldo + c;
        if (rows - r > kSize) {
          if (columns - c > kSize) {
            multiply_block<2, 2>(depth, at, lda, b + c, ldb, to, ldo, accumulate);
          } else {
            multiply_block<2, 1>(depth, at, lda, b + c, ldb, to, ldo, accumulate);
          }
        } else if (columns - c > kSize) {
          multiply_block<1, 2>(depth, at, lda, b + c, ldb, to, ldo, accumulate);
        } else {
          multiply_block<1, 1>(depth, at, lda, b + c, ldb, to, ldo, accumulate);
        }
      }
  }

  // Up to 32 rows of a, lda values apart, and one panel of gemm/tile.h, which has one or two strips, `next` apart, of K
  // pairs, or quads in the same place: a whole number of depths.
  struct Factors {
    const bf16* a;
    int64_t lda;
    const float* b;
    int64_t next, K;
  };

  // out [rows][vectors * kSize] (+)= the sum of `count` products of such factors. Whole tiles of rows are read and
  // written. Nothing is prefetched: reading 4 MB of panels took 1 to 10 % longer with prefetches into L2 on a Xeon,
  // where L3 gives 25 GB/s with and without.
  template <bool kInt8 = false>
  static DLK_NOINLINE void multiply_panel(int rows, int vectors, const Factors* factors, int count, float* out,
                                          int64_t ldo, bool accumulate) {
    if (rows <= kRows) {  // one sum alone would wait for the latency of its last product
      switch (vectors) {
        case 1:
          return multiply_row<1, kInt8>(factors, count, out, ldo, accumulate);
        case 2:
          return multiply_row<2, kInt8>(factors, count, out, ldo, accumulate);
        case 3:
          return multiply_row<3, kInt8>(factors, count, out, ldo, accumulate);
        default:
          return multiply_row<4, kInt8>(factors, count, out, ldo, accumulate);
      }
    }
    const int strip = vectors == 4 ? 2 : vectors;
    for (int v = 0; v < vectors; v += 2) {
      const auto block = [&](auto columns) __attribute__((always_inline)) {
        begin_sums<2, columns>(out + v * kSize, ldo, accumulate);
        for (int f = 0; f < count; ++f) {
          const float* from = factors[f].b + (strip == 2 ? v / 2 * factors[f].next : v * kSize);
          add_products<2, columns, kInt8>(2 * factors[f].K, factors[f].a, factors[f].lda, from, strip * kSize);
        }
        store_sums<2, columns>(out + v * kSize, ldo * static_cast<int64_t>(sizeof(float)));
      };
      if (vectors - v >= 2) {
        block(std::integral_constant<int, 2>());
      } else {
        block(std::integral_constant<int, 1>());
      }
    }
  }

  // Returns for each lane the sum of a(x) b(x) over x < width, in the order of multiply(): the diagonal of the product
  // of the lanes of a and those of b. a and b return vectors of bf16 values.
  template <class A, class B>
  static DLK_INLINE Vec<float> diagonal(int64_t width, A a, B b) {
    using V = Vec<float>;
    alignas(64) bf16 rows[kSize * kDepth];
    alignas(64) float columns[kSize * kSize], sums[kSize * kSize] = {}, diagonal[kSize];
    const auto value = [&](const auto& of, int64_t x) { return x < width ? of(x) : V::zero(); };
    for (int64_t x = 0; x < width; x += kDepth) {
      V block[kSize];
      for (int p = 0; p < kSize; ++p) {
        block[p] = pairs(value(a, x + 2 * p), value(a, x + 2 * p + 1));
        pairs(value(b, x + 2 * p), value(b, x + 2 * p + 1)).store(columns + p * kSize);
      }
      transpose(block);
      for (int r = 0; r < kSize; ++r) store(block[r], rows + r * kDepth);
      multiply_block<1, 1>(kDepth, rows, kDepth, columns, kSize, sums, kSize, true);
    }
    for (int i = 0; i < kSize; ++i) diagonal[i] = sums[i * (kSize + 1)];
    return V::load(diagonal);
  }

 private:
  // One tile of rows by kVectors vectors, whose sums are in tiles 0 to 3.
  template <int kVectors, bool kInt8>
  static DLK_INLINE void multiply_row(const Factors* factors, int count, float* out, int64_t ldo, bool accumulate) {
    constexpr int64_t kItem = sizeof(float), kHalf = sizeof(bf16);
    constexpr int64_t kWidth = (kVectors == 4 ? 2 : kVectors) * kSize;
    const auto each_sum = [&](auto act) __attribute__((always_inline)) {
      act(std::integral_constant<int, 0>());
      if constexpr (kVectors > 1) act(std::integral_constant<int, 1>());
      if constexpr (kVectors > 2) act(std::integral_constant<int, 2>());
      if constexpr (kVectors > 3) act(std::integral_constant<int, 3>());
    };
    each_sum([&](auto v) __attribute__((always_inline)) {
      if (accumulate) {
        TileRegisters::load<v>(out + v * kSize, ldo * kItem);
      } else {
        TileRegisters::zero<v>();
      }
    });
    for (int f = 0; f < count; ++f) {
      const bf16* a = factors[f].a;
      const float *b = factors[f].b, *third = b + (kVectors == 4 ? factors[f].next : 2 * kSize);
      const int64_t lda = factors[f].lda * kHalf;
      for (int64_t k = 0; k < factors[f].K; k += kRows) {
        TileRegisters::load<4>(a + 2 * k, lda);
        TileRegisters::load<6>(b + k * kWidth, kWidth * kItem);
        if constexpr (kVectors > 1) TileRegisters::load<7>(b + k * kWidth + kSize, kWidth * kItem);
        TileRegisters::multiply_add<0, 4, 6, kInt8>();
        if constexpr (kVectors > 2) TileRegisters::load<5>(third + k * kWidth, kWidth * kItem);
        if constexpr (kVectors > 1) TileRegisters::multiply_add<1, 4, 7, kInt8>();
        if constexpr (kVectors > 3) TileRegisters::load<6>(third + k * kWidth + kSize, kWidth * kItem);
        if constexpr (kVectors > 2) TileRegisters::multiply_add<2, 4, 5, kInt8>();
        if constexpr (kVectors > 3) TileRegisters::multiply_add<3, 4, 6, kInt8>();
      }
    }
    each_sum([&](auto v) __attribute__((always_inline)) { TileRegisters::store<v>(out + v * kSize, ldo * kItem); });
  }

  template <int kI, int kJ>
  static DLK_INLINE void multiply_block(int64_t depth, const bf16* a, int64_t lda, const float* b, int64_t ldb,
                                        float* out, int64_t ldo, bool accumulate) {
    begin_sums<kI, kJ>(out, ldo, accumulate);
    add_products<kI, kJ>(depth, a, lda, b, ldb);
    store_sums<kI, kJ>(out, ldo * static_cast<int64_t>(sizeof(float)));
  }
  template <int kI, int kJ>
  static DLK_INLINE void begin_sums(const float* out, int64_t ldo, bool accumulate) {
    if (accumulate) {
      load_sums<kI, kJ>(out, ldo * static_cast<int64_t>(sizeof(float)));
    } else {
      zero_sums<kI, kJ>();
    }
  }
  template <int kI, int kJ, bool kInt8 = false>
  static DLK_INLINE void add_products(int64_t depth, const bf16* a, int64_t lda, const float* b, int64_t ldb) {
    constexpr int64_t kItem = sizeof(float), kHalf = sizeof(bf16);
    for (; depth > 0; depth -= kDepth, a += kDepth, b += kDepth / 2 * ldb) {
      load_rows<kI>(a, lda * kHalf);
      load_columns<kJ>(b, ldb * kItem);
      multiply_add<kI, kJ, kInt8>();
    }
  }

  template <class S>
  static DLK_INLINE S* below(S* p, int64_t stride) {
    return p + kSize * stride / static_cast<int64_t>(sizeof(S));
  }
};

DLK_ISA_END
