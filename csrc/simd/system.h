// Includes what the headers of a target region need; they must be included before the region begins.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/types.h"
#include "simd/storage.h"
#include "simd/target.h"

#ifdef DLK_X86
// GCC 11 and 12 initialise their undefined vectors with themselves and then warn about it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace dlk {

// Bf16Unit of an instruction set that does not multiply bf16 (those that do: bf16_dots.h, amx_tiles.h).
struct NoBf16Unit {
  static constexpr int kRows = 1, kDepth = 1;
  static constexpr bool kPresent = false;
  struct Session {
    Session() {}
  };
};

}  // namespace dlk
