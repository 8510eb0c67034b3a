// What bf16_test.cpp asks of pairs, for each kind of unit. No include guard.

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
    CHECK(one[i].bits == rounded(wide_a[i]), "%s rounding of %.9g", kind, double(wide_a[i]));
  }
}
