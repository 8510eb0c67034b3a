#include "attention/cpu/system.h"

#ifdef DLK_AMX

DLK_TARGET_BEGIN(DLK_TARGET_AMX)
namespace dlk::amx {
constexpr Isa kIsa = Isa::amx;
constexpr int kRegisters = 32;
constexpr bool kPairs = false;
#include "simd/avx512.h"
#include "simd/math.h"
#include "simd/bf16_pairs.h"
#include "simd/amx_tiles.h"
#include "attention/cpu/all.h"
}  // namespace dlk::amx
DLK_TARGET_END

#endif  // DLK_AMX
