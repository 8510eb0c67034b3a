// Tests the Bf16Unit of one instruction set against plain loops (bf16_oracle.h). run.sh compiles this file four times:
// for DLK_ISA amx and avx512_bf16, each once with the machine's instructions and once with their emulation in plain C++
// (DLK_EMULATE_BF16).

#include <limits>
#include <random>
#include <vector>

#include "bf16_oracle.h"
#include "check.h"
#include "simd/bf16_unit.h"

#if DLK_ISA_IS_COMPILED

DLK_ISA_BEGIN

// `flushes`: whether rounding to pairs takes denormal numbers as 0, as rounding alone does.
inline void test_pairs(const char* kind, bool flushes, std::mt19937& random) {
  bf16 a[32], b[16];
  for (bf16& x : a) x.bits = any_value(random);
  for (bf16& x : b) x.bits = any_value(random);
  float wide_a[16], wide_b[16];
  for (int i = 0; i < 16; ++i) {
    const auto bits = static_cast<uint32_t>(random());
    wide_a[i] = bits_float(random() % 4 ? bits : bits & 0x80ffffffu);  // denormals, some next to normal numbers
    wide_b[i] = std::ldexp(static_cast<float>(random() % 100000), -12);
  }
  for (int n = 0; n <= 32; ++n) {
    bf16 got[32];
    Bf16Unit::store(Bf16Unit::pairs(a, n), got);
    for (int i = 0; i < 32; ++i) CHECK(got[i].bits == (i < n ? a[i].bits : 0), "%s pairs of %d at %d", kind, n, i);
  }
  for (int n = 0; n <= 16; ++n) {
    bf16 got[32];
    Bf16Unit::store(Bf16Unit::pairs(a, 16, b, n), got);
    for (int i = 0; i < 16; ++i)
      CHECK(got[2 * i].bits == a[i].bits && got[2 * i + 1].bits == (i < n ? b[i].bits : 0), "%s two rows, %d", kind, n);
  }
  const auto rounded = [&](float x) { return to_bf16(flushes ? flushed(x) : x).bits; };
  bf16 got[32], one[16];
  Bf16Unit::store(Bf16Unit::pairs(Vec<float>::load(wide_a), Vec<float>::load(wide_b)), got);
  Bf16Unit::round(Vec<float>::load(wide_a), one);
  for (int i = 0; i < 16; ++i) {
    CHECK(got[2 * i].bits == rounded(wide_a[i]) && got[2 * i + 1].bits == rounded(wide_b[i]),
          "%s rounding of %.9g and %.9g", kind, double(wide_a[i]), double(wide_b[i]));
    CHECK(one[i].bits == to_bf16(flushed(wide_a[i])).bits, "%s rounding of %.9g", kind, double(wide_a[i]));
  }
}

// The rough sigmoid and tanh against double: their relative error, and what no error may be seen in.
inline void test_rough(const char* kind, std::mt19937& random) {
  using V = Vec<float>;
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  std::uniform_real_distribution<float> exponent(-30, 7);
  alignas(64) float x[16], sigmoids[16], tanhs[16];
  for (int round = 0; round < 20000; ++round) {
    for (float& value : x) value = std::exp2(exponent(random)) * (random() % 2 ? 1.0f : -1.0f);
    if (round == 0) x[0] = 0, x[1] = -0.0f, x[2] = kInfinity, x[3] = -kInfinity, x[4] = kNan, x[5] = 1e-42f;
    const Pair<V> both = rough_sigmoid(Pair<V>{V::load(x), V::load(x)});
    both.b.store(sigmoids);
    rough_tanh(V::load(x)).store(tanhs);
    for (int i = 0; i < 16; ++i) {
      const double s = 1 / (1 + std::exp(-double(x[i]))), t = std::tanh(double(x[i]));
      const bool is_nan = x[i] != x[i];
      // Exactly 0, because torch's products with infinite states are NaN.
      CHECK(x[i] != -kInfinity || sigmoids[i] == 0, "%s sigmoid(-inf) = %.9g", kind, double(sigmoids[i]));
      CHECK(is_nan ? sigmoids[i] != sigmoids[i]
                   : std::fabs(sigmoids[i] - s) <= (3.2e-6 + 1.2e-7 * std::fmin(std::fabs(x[i]), 100.0f)) * s + 2e-38,
            "%s sigmoid(%.9g) = %.9g, want %.9g", kind, double(x[i]), double(sigmoids[i]), s);
      CHECK(is_nan ? tanhs[i] != tanhs[i] : std::fabs(tanhs[i] - t) <= 7e-6 * std::fabs(t) + 1e-44,
            "%s tanh(%.9g) = %.9g, want %.9g", kind, double(x[i]), double(tanhs[i]), t);
    }
  }
}

#if DLK_ISA_NUMBER == DLK_NUMBER_amx

// A panel of 1 to 4 vectors by 1 to 32 rows, as one product or as the sum of two, with and without sums from before.
inline void test_panel(const char* kind, std::mt19937& random) {
  const int vectors = 1 + int(random() % 4), rows = 1 + int(random() % 32), count = 1 + int(random() % 2);
  const int strip = vectors == 4 ? 2 : vectors, width = strip * 16, whole = (rows + 15) / 16 * 16;
  std::vector<bf16> a[2];
  std::vector<float> b[2], out(static_cast<size_t>(32) * vectors * 16 + 16), before;
  Bf16Unit::Factors factors[2];
  const auto small = [&] { return to_bf16(static_cast<float>(int(random() % 17) - 8)); };
  for (int f = 0; f < count; ++f) {
    const int64_t K = 16 * (1 + int64_t(random() % 3)), lda = 2 * K + 32, next = K * width;
    a[f].resize(static_cast<size_t>(32 * lda)), b[f].resize(static_cast<size_t>(K * vectors * 16));
    for (bf16& value : a[f]) value = small();
    for (float& pair : b[f]) pair = bits_float(uint32_t{small().bits} | uint32_t{small().bits} << 16);
    factors[f] = {a[f].data(), lda, b[f].data(), next, K};
  }
  for (float& value : out) value = static_cast<float>(int(random() % 100));
  before = out;
  const bool accumulate = random() % 2;
  Bf16Unit::multiply_panel(rows, vectors, factors, count, out.data(), vectors * 16, accumulate);
  for (int r = 0; r < 32; ++r)
    for (int c = 0; c < vectors * 16; ++c) {
      const size_t at = static_cast<size_t>(r * vectors * 16 + c);
      double want = accumulate ? double(before[at]) : 0;
      for (int f = 0; f < count; ++f)
        for (int64_t k = 0; k < factors[f].K; ++k) {
          const float pair = b[f][static_cast<size_t>(c / width * factors[f].next + k * width + c % width)];
          const bf16* row = factors[f].a + r * factors[f].lda + 2 * k;
          want += double(to_float(row[0])) * to_float(bf16{uint16_t(float_bits(pair))}) +
                  double(to_float(row[1])) * to_float(bf16{uint16_t(float_bits(pair) >> 16)});
        }
      if (r >= whole) want = double(before[at]);
      CHECK(double(out[at]) == want, "%s panel of %d vectors, %d rows, %d products: [%d][%d] is %.9g, want %.9g", kind,
            vectors, rows, count, r, c, double(out[at]), want);
    }
}

template <int kI, int kJ>
void test_product(const char* kind, std::mt19937& random) {
  Operands in;
  for (auto& row : in.rows)
    for (uint16_t& value : row) value = any_value(random);
  for (auto& pair : in.columns)
    for (auto& column : pair)
      for (uint16_t& value : column) value = any_value(random);
  for (auto& row : in.sums)
    for (float& sum : row) sum = to_float(bf16{any_value(random)});
  set_edge(in, random);
  float out[32][32];
  std::memcpy(out, in.sums, sizeof out);
  Bf16Unit::load_sums<kI, kJ>(out[0], sizeof out[0]);
  Bf16Unit::load_rows<kI>(reinterpret_cast<const bf16*>(in.rows[0]), sizeof in.rows[0]);
  Bf16Unit::load_columns<kJ>(reinterpret_cast<const float*>(in.columns[0]), sizeof in.columns[0]);
  Bf16Unit::multiply_add<kI, kJ>();
  Bf16Unit::store_sums<kI, kJ>(out[0], sizeof out[0]);
  for (int r = 0; r < 32; ++r)
    for (int c = 0; c < 32; ++c) {
      const float want = r < 16 * kI && c < 16 * kJ ? product(in, r, c) : in.sums[r][c];
      CHECK(same(out[r][c], want), "%s %dx%d [%d][%d]: %.9g, want %.9g", kind, kI, kJ, r, c, double(out[r][c]),
            double(want));
    }
}

// A session restores the tile shapes that it found: those of an outer session, or none.
inline void test_sessions(const char* kind) {
  TileRegisters::Shapes shapes{};
  const auto same = [&](const TileRegisters::Shapes& other) { return std::memcmp(&shapes, &other, sizeof other) == 0; };
  const auto now = [] {
    TileRegisters::Shapes found;
    TileRegisters::open(&found);
    TileRegisters::close(found);
    return found;
  };
  CHECK(same(now()), "%s: shapes before any session", kind);
  {
    const Bf16Unit::Session outer;
    CHECK(!same(now()), "%s: no shapes in a session", kind);
    shapes = now();
    {
      const Bf16Unit::Session inner;
    }
    CHECK(same(now()), "%s: shapes after an inner session", kind);
  }
  shapes = {};
  CHECK(same(now()), "%s: shapes after all sessions", kind);
}

inline void test_tiles(const char* kind) {
  test_sessions(kind);
  std::mt19937 random(1);
  const Bf16Unit::Session session;
  for (int i = 0; i < 100; ++i) {
    test_product<1, 1>(kind, random);
    test_product<1, 2>(kind, random);
    test_product<2, 1>(kind, random);
    test_product<2, 2>(kind, random);
    test_pairs(kind, false, random);
    test_panel(kind, random);
  }
  test_rough(kind, random);
}

#else

struct DotOperands {
  static constexpr int kRows = 29, kColumns = 144, kDepth = 34;
  uint16_t rows[kRows][kDepth];
  uint16_t columns[kDepth / 2][kColumns][2];
  float sums[kRows][kColumns];
  float product(int r, int c, int depth) const {
    float sum = 0;
    for (int p = 0; p < depth / 2; ++p)
      for (int half = 1; half >= 0; --half)
        sum = fused(value(rows[r][2 * p + half]), value(columns[p][c][half]), flushed(sum));
    return sum;
  }
};

inline void test_multiply(const char* kind, std::mt19937& random) {
  DotOperands in;
  const int rows = 1 + static_cast<int>(random() % DotOperands::kRows), depth = 2 * static_cast<int>(random() % 18);
  const int columns = 16 * (1 + static_cast<int>(random() % (DotOperands::kColumns / 16)));
  for (auto& row : in.rows)
    for (uint16_t& x : row) x = any_value(random);
  for (auto& pair : in.columns)
    for (auto& column : pair)
      for (uint16_t& x : column) x = any_value(random);
  for (auto& row : in.sums)
    for (float& sum : row) sum = to_float(bf16{any_value(random)});
  set_edge(in, random);
  for (const bool accumulate : {false, true}) {
    float out[DotOperands::kRows][DotOperands::kColumns];
    std::memcpy(out, in.sums, sizeof out);
    Bf16Unit::multiply(rows, columns, depth, reinterpret_cast<const bf16*>(in.rows[0]), DotOperands::kDepth,
                       reinterpret_cast<const float*>(in.columns[0]), DotOperands::kColumns, out[0],
                       DotOperands::kColumns, accumulate);
    for (int r = 0; r < DotOperands::kRows; ++r)
      for (int c = 0; c < DotOperands::kColumns; ++c) {
        float want = in.sums[r][c];
        if (r < rows && c < columns) want = accumulate ? want + in.product(r, c, depth) : in.product(r, c, depth);
        CHECK(same(out[r][c], want), "%s %dx%dx%d%s [%d][%d]: %.9g, want %.9g", kind, rows, columns, depth,
              accumulate ? " +" : "", r, c, double(out[r][c]), double(want));
      }
  }
}

// Compares the diagonal of a product bit for bit.
inline void test_diagonal(const char* kind, std::mt19937& random) {
  const int width = 1 + static_cast<int>(random() % DotOperands::kDepth);
  float a[DotOperands::kDepth][16], b[DotOperands::kDepth][16], got[16];
  for (auto* side : {&a, &b})
    for (auto& x : *side)
      for (float& lane : x) lane = to_float(bf16{any_value(random)});
  const auto load = [](const auto& side) { return [&side](int64_t x) { return Vec<float>::load(side[x]); }; };
  Bf16Unit::diagonal(width, load(a), load(b)).store(got);
  for (int i = 0; i < 16; ++i) {
    float want = 0;
    for (int x = 0; x < width; x += 2)
      for (int y = x + 1; y >= x; --y)
        want = fused(y < width ? flushed(a[y][i]) : 0, y < width ? flushed(b[y][i]) : 0, want);
    CHECK(same(got[i], want), "%s diagonal of %d: %.9g, want %.9g", kind, width, double(got[i]), double(want));
  }
}

inline void test_dots(const char* kind) {
  std::mt19937 random(1);
  for (int i = 0; i < 100; ++i) {
    test_multiply(kind, random);
    test_diagonal(kind, random);
    test_pairs(kind, true, random);
  }
  test_rough(kind, random);
}

#endif

DLK_ISA_END

// Returns false if this compiler does not know the instructions.
bool DLK_JOIN(test_, DLK_ISA_NAMESPACE)(const char* kind) {
#if DLK_ISA_NUMBER == DLK_NUMBER_amx
  dlk::DLK_ISA_NAMESPACE::test_tiles(kind);
#else
  dlk::DLK_ISA_NAMESPACE::test_dots(kind);
#endif
  return true;
}

#else

bool DLK_JOIN(test_, DLK_ISA_NAMESPACE)(const char*) { return false; }

#endif
