// The emulated matrix unit against plain loops over what the manual says of the instruction; where the machine has one,
// that too.
#include <random>

#include "../../csrc/cpu/simd/system.h"
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

float product(const Operands& in, int r, int c) {
  float even = 0, odd = 0;
  for (int p = 0; p < 16; ++p) {
    const auto value = [](uint16_t bits) { return flushed(dlk::to_float(dlk::bf16{bits})); };
    even = fused(value(in.rows[r][2 * p]), value(in.columns[p][c][0]), even);
    odd = fused(value(in.rows[r][2 * p + 1]), value(in.columns[p][c][1]), odd);
  }
  return flushed(flushed(in.sums[r][c]) + flushed(even + odd));
}

// The first sum becomes the least normal number, and then a little less: where denormals and normal numbers meet.
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
#undef DLK_EMULATE_AMX
#define DLK_EMULATE_AMX
DLK_TARGET_BEGIN(DLK_TARGET_AVX512)
namespace dlk::emulated {
#include "../../csrc/cpu/simd/avx512.h"
#include "../../csrc/cpu/simd/amx_tiles.h"
#include "tiles_test_body.h"
}  // namespace dlk::emulated
DLK_TARGET_END

#ifdef DLK_TARGET_TILES
#undef DLK_EMULATE_AMX
DLK_TARGET_BEGIN(DLK_TARGET_TILES)
namespace dlk::real {
#include "../../csrc/cpu/simd/avx512.h"
#include "../../csrc/cpu/simd/amx_tiles.h"
#include "tiles_test_body.h"
}  // namespace dlk::real
DLK_TARGET_END

namespace {

bool has_tiles() {
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace
#endif

int main() {
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl")) {
    std::printf("tiles_test: nothing tested, the emulation is written for AVX-512\n");
    return 0;
  }
  dlk::emulated::test_tiles("emulated");
#ifdef DLK_TARGET_TILES
  if (has_tiles()) {
    dlk::real::test_tiles("real");
    return report("tiles_test");
  }
#endif
  std::printf("tiles_test: no AMX here, only its emulation is tested\n");
  return report("tiles_test");
}

#else

int main() {
  std::printf("tiles_test: nothing tested, this is no x86\n");
  return 0;
}

#endif  // DLK_X86
