// What tiles_test.cpp asks of each kind of tiles. No include guard.

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
  Tiles::load_sums<kI, kJ>(out[0], sizeof out[0]);
  Tiles::load_rows<kI>(reinterpret_cast<const bf16*>(in.rows[0]), sizeof in.rows[0]);
  Tiles::load_columns<kJ>(reinterpret_cast<const float*>(in.columns[0]), sizeof in.columns[0]);
  Tiles::multiply_add<kI, kJ>();
  Tiles::store_sums<kI, kJ>(out[0], sizeof out[0]);
  for (int r = 0; r < 32; ++r)
    for (int c = 0; c < 32; ++c) {
      const float want = r < 16 * kI && c < 16 * kJ ? product(in, r, c) : in.sums[r][c];
      CHECK(same(out[r][c], want), "%s %dx%d [%d][%d]: %.9g, want %.9g", kind, kI, kJ, r, c, double(out[r][c]),
            double(want));
    }
}

inline void test_pairs(const char* kind, std::mt19937& random) {
  bf16 a[32], b[16];
  for (bf16& x : a) x.bits = any_value(random);
  for (bf16& x : b) x.bits = any_value(random);
  float wide_a[16], wide_b[16];
  for (int i = 0; i < 16; ++i) {
    wide_a[i] = bits_float(static_cast<uint32_t>(random()));
    wide_b[i] = std::ldexp(static_cast<float>(random() % 100000), -12);
  }
  for (int n = 0; n <= 32; ++n) {
    bf16 got[32];
    Tiles::store(Tiles::pairs(a, n), got);
    for (int i = 0; i < 32; ++i) CHECK(got[i].bits == (i < n ? a[i].bits : 0), "%s pairs of %d at %d", kind, n, i);
  }
  for (int n = 0; n <= 16; ++n) {
    bf16 got[32];
    Tiles::store(Tiles::pairs(a, 16, b, n), got);
    for (int i = 0; i < 16; ++i)
      CHECK(got[2 * i].bits == a[i].bits && got[2 * i + 1].bits == (i < n ? b[i].bits : 0), "%s two rows, %d", kind, n);
  }
  bf16 got[32];
  Tiles::store(Tiles::pairs(Vec<float>::load(wide_a), Vec<float>::load(wide_b)), got);
  for (int i = 0; i < 16; ++i)
    CHECK(got[2 * i].bits == to_bf16(wide_a[i]).bits && got[2 * i + 1].bits == to_bf16(wide_b[i]).bits,
          "%s rounding of %.9g and %.9g", kind, double(wide_a[i]), double(wide_b[i]));
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
    const Tiles::Session outer;
    CHECK(!same(now()), "%s: no shapes in a session", kind);
    shapes = now();
    {
      const Tiles::Session inner;
    }
    CHECK(same(now()), "%s: shapes after an inner session", kind);
  }
  shapes = {};
  CHECK(same(now()), "%s: shapes after all sessions", kind);
}

inline void test_tiles(const char* kind) {
  test_sessions(kind);
  std::mt19937 random(1);
  const Tiles::Session session;
  for (int i = 0; i < 100; ++i) {
    test_product<1, 1>(kind, random);
    test_product<1, 2>(kind, random);
    test_product<2, 1>(kind, random);
    test_product<2, 2>(kind, random);
    test_pairs(kind, random);
  }
}
