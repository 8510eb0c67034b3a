// Everything that an attention ISA file needs from outside its target region.
#pragma once

#include <atomic>
#include <new>
#include <type_traits>
#include <utility>

#include "../scratch.h"
#include "../simd/system.h"
#include "attention_kernels.h"

namespace dlk {

// Where nothing multiplies bf16 as such (bf16_dots.h, amx_tiles.h).
struct NoBf16Unit {
  static constexpr int kRows = 1, kDepth = 1;
  static constexpr bool kPresent = false;
  struct Session {
    Session() {}
  };
};

}  // namespace dlk
