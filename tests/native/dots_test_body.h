// What bf16_test.cpp asks of each kind of dot products. No include guard.

#include "pairs_test_body.h"

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

// The diagonal of a product, to the last bit.
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
}
