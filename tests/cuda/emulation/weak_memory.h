// What a GPU may do with relaxed loads and stores of pieces (device.h), as unfavourably as it may:
// - a store that makes a piece absent reaches the other blocks only after this block has signalled, or together with a
//   later store to the same piece;
// - a load sees what this block saw in the same place before, and only the next load sees what is there now, unless
// this
//   block has waited for a signal in between.
// Each block has an object of its own, which its OS thread alone uses.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <unordered_map>

namespace emulation {

class WeakMemory {
 public:
  // `barriers` is how many barriers of the block have been before. A signal of one thread covers what others did before
  // the last barrier.
  void erase(void* piece, unsigned thread, unsigned barriers) { erased_[piece] = {thread, barriers}; }
  void store(void* piece) { erased_.erase(piece); }

  void release(unsigned thread, unsigned barriers) {
    for (auto at = erased_.begin(); at != erased_.end();) {
      if (at->second.thread != thread && at->second.barriers == barriers) {
        ++at;
        continue;
      }
      for (int i = 0; i < 4; ++i) __atomic_store_n(static_cast<uint32_t*>(at->first) + i, ~0u, __ATOMIC_RELAXED);
      at = erased_.erase(at);
    }
  }

  void load(const void* piece, uint4* value) {
    const auto [known, first] = seen_.try_emplace(piece, *value);
    if (!first) std::swap(known->second, *value);
  }
  void acquire() { seen_.clear(); }

 private:
  struct Erased {
    unsigned thread, barriers;
  };
  std::unordered_map<void*, Erased> erased_;
  std::unordered_map<const void*, uint4> seen_;
};

}  // namespace emulation
