#include "attention_system.h"

namespace dlk::scalar {
constexpr Isa kIsa = Isa::scalar;
constexpr int kRegisters = 16;
using Tiles = NoTiles;
#include "../simd/scalar.h"
#include "../simd/math.h"
#include "../generic/attention.h"
}  // namespace dlk::scalar
