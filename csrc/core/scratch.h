// The workspace of one call: one block of memory, carved by bump allocation. The caller makes
// the same take() calls twice: before allocate() they only add up the size, after it they
// return addresses.
//
// Blocks of up to kKept bytes are kept per thread, so that a short call needs no malloc. One
// larger block, of up to kSpare bytes, is kept per process: the system zeroes every page that
// it hands out, which costs a call with 10 MB up to 2 % of its time.
//
// Under the address sanitizer no block is kept, and a cache line that may not be touched follows each piece.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "huge_pages.h"
#include "memory.h"
#include "runtime_flags.h"

#if defined(__SANITIZE_ADDRESS__)
#define DLK_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define DLK_ADDRESS_SANITIZER 1
#endif
#endif
#ifdef DLK_ADDRESS_SANITIZER
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace dlk {

class Scratch {
 public:
  void allocate() {
    if (kGuard > 0) {
      large_ = Block::fresh(total_);
      base_ = large_.memory;
    } else if (total_ <= kKept) {
      static thread_local Kept kept;
      base_ = kept.reserve();
    } else {
      large_ = Block::take(total_);
      base_ = large_.memory;
    }
    if (poison()) std::memset(base_, 0xff, total_);
    next_ = base_;
  }

  // Returns `count` elements that begin on a cache line of their own; null if count is 0, and before allocate().
  template <class T>
  T* take(int64_t count) {
    if (count <= 0) return nullptr;
    if (!base_) {
      size_t bytes = 0;
      if (__builtin_mul_overflow(static_cast<size_t>(count), sizeof(T), &bytes) || bytes > kLargest - total_) {
        throw_too_large(kWhat);
      }
      total_ += round_up(bytes) + kGuard;
      return nullptr;
    }
    T* here = reinterpret_cast<T*>(next_);
    next_ += round_up(static_cast<size_t>(count) * sizeof(T));
#ifdef DLK_ADDRESS_SANITIZER
    __asan_poison_memory_region(next_, kGuard);
#endif
    next_ += kGuard;
    return here;
  }

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
#ifdef DLK_ADDRESS_SANITIZER
    if (large_.memory) __asan_unpoison_memory_region(large_.memory, large_.size);
    std::free(large_.memory);
#else
    if (large_.memory) Block::give_back(large_);
#endif
  }

 private:
  static constexpr const char* kWhat = "the working memory of the kernels";
  static constexpr size_t kLargest = size_t{1} << 62;
  static constexpr size_t kAlign = 64, kKept = size_t{2} << 20, kSpare = size_t{64} << 20;
#ifdef DLK_ADDRESS_SANITIZER
  static constexpr size_t kGuard = kAlign;
#else
  static constexpr size_t kGuard = 0;
#endif
  static size_t round_up(size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

  struct Kept {
    char* memory = nullptr;
    char* reserve() {
      if (!memory) memory = static_cast<char*>(std::aligned_alloc(kAlign, kKept));
      if (!memory) throw_out_of_memory(kKept, kWhat);
      return memory;
    }
    ~Kept() { std::free(memory); }
  };

  struct Block {
    char* memory = nullptr;
    size_t size = 0;

    static Block take(size_t wanted) {
      Block block;
      spare().take(&block);
      if (block.size >= wanted) return block;
      std::free(block.memory);
      return fresh(wanted);
    }

    static Block fresh(size_t wanted) {
      Block block;
      // Without huge pages, passes over many megabytes of panels and products keep missing the TLB.
      const size_t unit = wanted >= kHugeFrom ? kHugePage : kAlign;
      block.size = (wanted + unit - 1) / unit * unit;
      block.memory = static_cast<char*>(std::aligned_alloc(unit, block.size));
      if (!block.memory) throw_out_of_memory(wanted, kWhat);
      want_huge_pages(block.memory, block.size);
      return block;
    }

    static void give_back(Block block) {
      if (block.size <= kSpare) spare().swap(&block);
      std::free(block.memory);
    }
  };

  // Holds the kept block. A thread that finds the flag set does without the block. So nothing ever waits for the flag,
  // not even the child of a fork that happened while another thread had set it.
  class Spare {
   public:
    void take(Block* block) {
      if (busy_.test_and_set(std::memory_order_acquire)) return;
      *block = kept_;
      kept_ = Block();
      busy_.clear(std::memory_order_release);
    }
    void swap(Block* block) {
      if (busy_.test_and_set(std::memory_order_acquire)) return;
      std::swap(*block, kept_);
      busy_.clear(std::memory_order_release);
    }

   private:
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    Block kept_;
  };
  static Spare& spare() {
    static Spare* one = new Spare;  // never destroyed: other threads may still work at exit
    return *one;
  }

  size_t total_ = 0;
  char *base_ = nullptr, *next_ = nullptr;
  Block large_;
};

}  // namespace dlk
