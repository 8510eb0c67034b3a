#include "rnn/cpu/system.h"

namespace dlk::scalar {
constexpr Isa kIsa = Isa::scalar;
constexpr int kRegisters = 16;
constexpr bool kPairs = false;
using Bf16Unit = NoBf16Unit;
#include "simd/scalar.h"
#include "simd/math.h"
#include "rnn/cpu/all.h"
}  // namespace dlk::scalar
