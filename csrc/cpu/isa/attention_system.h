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

// In place of a matrix unit (amx_tiles.h) where there is none.
struct NoTiles {
  static constexpr int kSize = 1, kDepth = 1;
  static constexpr bool kPresent = false;
  struct Session {
    Session() {}
  };
};

}  // namespace dlk
