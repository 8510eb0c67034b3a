// A matrix unit: four tiles of sums, 16 x 16 floats, two by two; two tiles of 16 rows of 32 bf16 values, beside them;
// two of 16 columns of them, above: of each column 16 pairs of values, [pair][column]. multiply_add adds to each sum
// the product of its row and its column. Strides are in bytes. No include guard: see target.h.
//
// With DLK_EMULATE_AMX in plain C++, to the last bit, and it stops the program where no Session is open.

#ifdef DLK_EMULATE_AMX

class TileRegisters {
 public:
  using Shapes = bool;  // whether there are any
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
  // The even values of a row and the odd ones are summed apart, in order, each from 0.
  template <int kSums, int kRows, int kColumns>
  static void multiply_add() {
    for (int r = 0; r < 16; ++r) {
      float parts[2][16] = {};
      for (int p = 0; p < 16; ++p)
        for (int c = 0; c < 16; ++c)
          for (int half = 0; half < 2; ++half) {
            const float x = value(tile(kRows)[r][p], half), y = value(tile(kColumns)[p][c], half);
            parts[half][c] = fused(x, y, parts[half][c]);
          }
      for (int c = 0; c < 16; ++c) {
        uint32_t& sum = tile(kSums)[r][c];
        sum = float_bits(normal(normal(bits_float(sum)) + normal(parts[0][c] + parts[1][c])));
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
  // Denormals, in or out, count as 0.
  static float normal(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
  // x y + sum. What is tiny is told before it is rounded to the denormals' grid, which may make a normal number of it.
  static float fused(float x, float y, float sum) {
    constexpr float kLeast = std::numeric_limits<float>::min(), kUp = 0x1p64f;
    const float z = __builtin_fmaf(x, y, sum);
    const bool tiny = std::fabs(z) == kLeast && std::fabs(__builtin_fmaf(x * kUp, y, sum * kUp)) < kLeast * kUp;
    return tiny ? std::copysign(0.0f, z) : normal(z);
  }
  static float value(uint32_t pair, int half) { return normal(bits_float(half ? pair & 0xffff0000u : pair << 16)); }
};

#else

// The intrinsics want their tiles as literals.
struct TileRegisters {
  struct alignas(64) Shapes {
    uint8_t bytes[64];  // the first is the palette, 0 where there are no shapes
  };
  static DLK_INLINE void open(Shapes* before) {
    // Palette 1, eight tiles of 64 bytes by 16 rows.
    static constexpr Shapes kShapes = {
        {1,  0, 0,  0, 0,  0, 0,  0, 0,  0,  0,  0,  0,  0,  0,  0,                           //
         64, 0, 64, 0, 64, 0, 64, 0, 64, 0,  64, 0,  64, 0,  64, 0,  0, 0, 0, 0, 0, 0, 0, 0,  //
         0,  0, 0,  0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0}};
    _tile_storeconfig(before->bytes);
    asm volatile("" ::: "memory");  // GCC's intrinsics speak of 8 bytes only
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
    asm volatile("" ::: "memory");  // GCC's intrinsic does not say that it reads
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
  template <int kSums, int kRows, int kColumns>
  static DLK_INLINE void multiply_add() {
    if constexpr (kSums == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kSums == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSums == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kSums == 3) _tile_dpbf16ps(3, 5, 7);
  }
};

#endif

struct Tiles {
  static constexpr bool kPresent = true;
  static constexpr int kSize = 16;   // rows and columns of a tile
  static constexpr int kDepth = 32;  // values of a row or column of it

  // The tiles' shapes belong to the thread: nothing else may set them while this lives. Those of other libraries, some
  // of which leave theirs from call to call, are put back.
  class Session {
   public:
    DLK_NOINLINE Session() { TileRegisters::open(&before_); }
    DLK_NOINLINE ~Session() { TileRegisters::close(before_); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    TileRegisters::Shapes before_;
  };

  // In what follows kI by kJ of the 2 by 2 sums take part.
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
  template <int kI>
  static DLK_INLINE void load_rows(const bf16* from, int64_t stride) {
    TileRegisters::load<4>(from, stride);
    if constexpr (kI == 2) TileRegisters::load<5>(below(from, stride), stride);
  }
  template <int kJ>
  static DLK_INLINE void load_columns(const float* from, int64_t stride) {
    TileRegisters::load<6>(from, stride);
    if constexpr (kJ == 2) TileRegisters::load<7>(from + kSize, stride);
  }
  template <int kI, int kJ>
  static DLK_INLINE void multiply_add() {
    TileRegisters::multiply_add<0, 4, 6>();
    if constexpr (kJ == 2) TileRegisters::multiply_add<1, 4, 7>();
    if constexpr (kI == 2) TileRegisters::multiply_add<2, 5, 6>();
    if constexpr (kI == 2 && kJ == 2) TileRegisters::multiply_add<3, 5, 7>();
  }

  // Pairs of bf16 values travel as the bits of floats. n values, 0..32, as they lie; zeros beyond:
  static DLK_INLINE Vec<float> pairs(const bf16* from, int n) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), from))};
  }
  // ... n and m values, 0..16, of two rows, side by side;
  static DLK_INLINE Vec<float> pairs(const bf16* a, int n, const bf16* b, int m) {
    const __m512i low = _mm512_cvtepu16_epi32(load16(a, n)), high = _mm512_cvtepu16_epi32(load16(b, m));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  // ... two vectors, rounded, side by side.
  static DLK_INLINE Vec<float> pairs(Vec<float> a, Vec<float> b) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(
        _mm512_or_si512(_mm512_srli_epi32(rounded_bits(a), 16), _mm512_and_si512(rounded_bits(b), upper)))};
  }
  static DLK_INLINE void store(Vec<float> pairs, bf16* to) { _mm512_storeu_ps(to, pairs.v); }

 private:
  template <class S>
  static DLK_INLINE S* below(S* p, int64_t stride) {
    return p + kSize * stride / static_cast<int64_t>(sizeof(S));
  }
  // The upper half is the nearest bf16 value, ties to even; NaN stays NaN.
  static DLK_INLINE __m512i rounded_bits(Vec<float> a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_mask_or_epi32(sum, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  }
};
