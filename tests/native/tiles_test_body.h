// What bf16_test.cpp asks of each kind of tiles. No include guard.

#include "pairs_test_body.h"

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

// A session puts back what it found: the shapes of an outer one, or none.
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
  }
}
