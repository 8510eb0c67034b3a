// Working memory of one call: one block, carved by bump allocation. Small blocks are
// kept per thread so that a short call costs no malloc; larger ones go back at once.
// Used twice over the same list of take()s: before allocate() they only add up.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "runtime_flags.h"

namespace dlk {

class Scratch {
 public:
  void allocate() {
    if (total_ <= kKept) {
      static thread_local Kept kept;
      base_ = kept.reserve();
    } else {
      // Large ones in huge pages where the system grants them: walks through many megabytes of panels and
      // products would else keep missing the TLB.
      const bool huge = total_ >= kHugeFrom;
      const size_t unit = huge ? kHugePage : kAlign, size = (total_ + unit - 1) / unit * unit;
      owned_ = base_ = static_cast<char*>(std::aligned_alloc(unit, size));
      if (!base_) throw std::bad_alloc();
#if defined(__linux__)
      if (huge) madvise(base_, size, MADV_HUGEPAGE);
#endif
    }
    if (poison()) std::memset(base_, 0xff, total_);
    next_ = base_;
  }

  // count elements on a cache line of their own; null for none (and before allocate()).
  template <class T>
  T* take(int64_t count) {
    if (count <= 0) return nullptr;
    if (!base_) {
      total_ += round_up(static_cast<size_t>(count) * sizeof(T));
      return nullptr;
    }
    T* here = reinterpret_cast<T*>(next_);
    next_ += round_up(static_cast<size_t>(count) * sizeof(T));
    return here;
  }

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(owned_); }

 private:
  static constexpr size_t kAlign = 64, kHugePage = size_t{2} << 20, kHugeFrom = size_t{8} << 20,
                          kKept = size_t{2} << 20;
  static size_t round_up(size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

  struct Kept {
    char* memory = nullptr;
    char* reserve() {
      if (!memory) memory = static_cast<char*>(std::aligned_alloc(kAlign, kKept));
      if (!memory) throw std::bad_alloc();
      return memory;
    }
    ~Kept() { std::free(memory); }
  };

  size_t total_ = 0;
  char *base_ = nullptr, *next_ = nullptr, *owned_ = nullptr;
};

}  // namespace dlk
