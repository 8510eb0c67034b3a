// Reads and writes the elements of tensors of every dtype as doubles, one at a time: the storage half of the oracles
// (naive.h, attention_naive.h). It shares no code with the kernels; the conversions of float16 and bfloat16 are written
// anew from the formats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/types.h"

namespace dlk {
namespace naive {

using Vector = std::vector<double>;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double half_to_double(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

inline uint16_t double_to_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520.0) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  if (magnitude == 0.0 || exponent < -13) exponent = -13;  // a subnormal number, whose steps are 2^-24
  const double steps = std::nearbyint(std::ldexp(magnitude, 11 - exponent));
  // A normal number has 1024..2047 steps. If rounding gives 2048, the addition below carries into the exponent.
  const int biased = exponent + 14;
  return sign | static_cast<uint16_t>(steps + (biased > 1 ? (biased - 1) * 1024.0 : 0.0));
}

inline uint16_t double_to_bfloat(double value) {
  const uint32_t bits = float_to_bits(static_cast<float>(value));
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline double load(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(data)[index];
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return bits_to_float(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16);
    case DType::f16:
      return half_to_double(static_cast<const uint16_t*>(data)[index]);
  }
  return NAN;
}

inline void store(void* data, int64_t index, DType dtype, double value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[index] = double_to_bfloat(value);
      break;
    case DType::f16:
      static_cast<uint16_t*>(data)[index] = double_to_half(value);
      break;
  }
}

inline DType compute_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Reads `count` elements from `index` on; without an array, zeros.
inline Vector load_vector(const void* data, int64_t index, int64_t count, DType dtype) {
  Vector values(static_cast<size_t>(count), 0.0);
  if (data) {
    for (int64_t i = 0; i < count; ++i) values[i] = load(data, index + i, dtype);
  }
  return values;
}

inline void store_vector(void* data, int64_t index, const Vector& values, DType dtype) {
  if (!data) return;
  for (size_t i = 0; i < values.size(); ++i) store(data, index + static_cast<int64_t>(i), dtype, values[i]);
}

}  // namespace naive
}  // namespace dlk
