// What multiplies bf16, emulated, against plain loops over what the manuals say of the instructions; where the machine
// has them, these too.
#include <random>

#include "simd/system.h"
#include "check.h"

#ifdef DLK_X86

#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct Operands {
  uint16_t rows[32][32], columns[16][32][2];  // [row][value], [pair][column][half]
  float sums[32][32];
};

// Denormals, infinities and NaN are among them.
uint16_t any_value(std::mt19937& random) {
  if (random() % 4 == 0) return static_cast<uint16_t>(random());
  return dlk::to_bf16(std::ldexp(static_cast<float>(random() % 513) - 256, -static_cast<int>(random() % 30))).bits;
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// x y + sum, 0 if it is tiny when it is rounded as if exponents had no end.
float fused(float x, float y, float sum) {
  const float z = std::fma(x, y, sum);
  if (std::fabs(z) != std::numeric_limits<float>::min()) return flushed(z);
  const float scaled = static_cast<float>(std::ldexp(double{x} * double{y} + double{sum}, 64));
  return std::fabs(scaled) < std::ldexp(std::fabs(z), 64) ? std::copysign(0.0f, z) : z;
}

float value(uint16_t bits) { return flushed(dlk::to_float(dlk::bf16{bits})); }

float product(const Operands& in, int r, int c) {
  float even = 0, odd = 0;
  for (int p = 0; p < 16; ++p) {
    even = fused(value(in.rows[r][2 * p]), value(in.columns[p][c][0]), even);
    odd = fused(value(in.rows[r][2 * p + 1]), value(in.columns[p][c][1]), odd);
  }
  return flushed(flushed(in.sums[r][c]) + flushed(even + odd));
}

// The first sum becomes the least normal number, and then a little less: where denormals and normal numbers meet.
template <class Operands>
void set_edge(Operands& in, std::mt19937& random) {
  const auto bits = [](float x) { return dlk::to_bf16(x).bits; };
  for (uint16_t& value : in.rows[0]) value = 0;
  for (auto& pair : in.columns) pair[0][0] = pair[0][1] = 0;
  in.sums[0][0] = 0;
  in.rows[0][0] = in.columns[0][0][0] = bits(0x1p-63f);
  in.rows[0][2] = bits(0x1p-75f);
  in.columns[1][0][0] = bits(-0x1p-83f * static_cast<float>(128 + random() % 256));
}

bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); }

}  // namespace

// Both kinds, whatever the command line has chosen.
#undef DLK_EMULATE_BF16
#define DLK_EMULATE_BF16
DLK_TARGET_BEGIN(DLK_TARGET_AVX512)
namespace dlk::emulated_tiles {
#include "simd/avx512.h"
#include "simd/bf16_pairs.h"
#include "simd/amx_tiles.h"
#include "tiles_test_body.h"
}  // namespace dlk::emulated_tiles
namespace dlk::emulated_dots {
#include "simd/avx512.h"
#include "simd/bf16_pairs.h"
#include "simd/bf16_dots.h"
#include "dots_test_body.h"
}  // namespace dlk::emulated_dots
DLK_TARGET_END
#undef DLK_EMULATE_BF16

#ifdef DLK_TARGET_TILES
DLK_TARGET_BEGIN(DLK_TARGET_TILES)
namespace dlk::tiles {
#include "simd/avx512.h"
#include "simd/bf16_pairs.h"
#include "simd/amx_tiles.h"
#include "tiles_test_body.h"
}  // namespace dlk::tiles
DLK_TARGET_END
#endif

#ifdef DLK_TARGET_DOTS
DLK_TARGET_BEGIN(DLK_TARGET_DOTS)
namespace dlk::dots {
#include "simd/avx512.h"
#include "simd/bf16_pairs.h"
#include "simd/bf16_dots.h"
#include "dots_test_body.h"
}  // namespace dlk::dots
DLK_TARGET_END
#endif

namespace {

bool has_bit(unsigned leaf, unsigned subleaf, int word, int index) {  // words: eax, ebx, ecx, edx
  unsigned r[4] = {leaf, 0, subleaf, 0};
  __asm__("cpuid" : "+a"(r[0]), "=b"(r[1]), "+c"(r[2]), "=d"(r[3]));
  return r[word] >> index & 1;
}
[[maybe_unused]] bool has_tiles() {
  return has_bit(7, 0, 3, 22) && has_bit(7, 0, 3, 24) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
[[maybe_unused]] bool has_dots() { return has_bit(7, 1, 0, 5); }

}  // namespace

int main() {
  if (!has_avx512()) {
    std::printf("bf16_test: nothing tested, the emulation is written for AVX-512\n");
    return 0;
  }
  dlk::emulated_tiles::test_tiles("emulated tiles");
  dlk::emulated_dots::test_dots("emulated dots");
  bool tiles = false, dots = false;
#ifdef DLK_TARGET_TILES
  if ((tiles = has_tiles())) dlk::tiles::test_tiles("tiles");
#endif
#ifdef DLK_TARGET_DOTS
  if ((dots = has_dots())) dlk::dots::test_dots("dots");
#endif
  if (!tiles) std::printf("bf16_test: no AMX here, only its emulation is tested\n");
  if (!dots) std::printf("bf16_test: no AVX512_BF16 here, only its emulation is tested\n");
  return report("bf16_test");
}

#else

int main() {
  std::printf("bf16_test: nothing tested, this is no x86\n");
  return 0;
}

#endif  // DLK_X86
