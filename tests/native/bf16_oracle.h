// An oracle in plain loops for the instructions that multiply bfloat16 (vdpbf16ps, tdpbf16ps), written from Intel's
// manuals.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>

#include "simd/storage.h"

namespace {

struct Operands {
  uint16_t rows[32][32], columns[16][32][2];  // [row][value], [pair][column][half]
  float sums[32][32];
};

// Random bf16 bits, among them denormals, infinities and NaN.
uint16_t any_value(std::mt19937& random) {
  if (random() % 4 == 0) return static_cast<uint16_t>(random());
  return dlk::to_bf16(std::ldexp(static_cast<float>(random() % 513) - 256, -static_cast<int>(random() % 30))).bits;
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// x y + sum, rounded once. The result is flushed to 0 if it is below the least normal number after rounding with an
// unbounded exponent range (tininess after rounding), even where rounding to the denormals' grid gives the least normal
// number.
float fused(float x, float y, float sum) {
  const float z = std::fma(x, y, sum);
  if (std::fabs(z) != std::numeric_limits<float>::min()) return flushed(z);
  const float scaled = static_cast<float>(std::ldexp(double{x} * double{y} + double{sum}, 64));
  return std::fabs(scaled) < std::ldexp(std::fabs(z), 64) ? std::copysign(0.0f, z) : z;
}

float value(uint16_t bits) { return flushed(dlk::to_float(dlk::bf16{bits})); }

[[maybe_unused]] float product(const Operands& in, int r, int c) {
  float even = 0, odd = 0;
  for (int p = 0; p < 16; ++p) {
    even = fused(value(in.rows[r][2 * p]), value(in.columns[p][c][0]), even);
    odd = fused(value(in.rows[r][2 * p + 1]), value(in.columns[p][c][1]), odd);
  }
  return flushed(flushed(in.sums[r][c]) + flushed(even + odd));
}

// Sets the operands of element [0][0] so that its sum first becomes the least normal number, 2^-126, and then a little
// less: the boundary between normal numbers and denormals.
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
