// The interfaces of the sanitizers, as weak symbols, so that one object file of the emulation serves every build.
#pragma once

#include <cstddef>

extern "C" {
#define WEAK __attribute__((weak))
void __sanitizer_start_switch_fiber(void**, const void*, size_t) WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) WEAK;
void __asan_poison_memory_region(const volatile void*, size_t) WEAK;
void __asan_unpoison_memory_region(const volatile void*, size_t) WEAK;
void* __tsan_get_current_fiber() WEAK;
void* __tsan_create_fiber(unsigned) WEAK;
void __tsan_destroy_fiber(void*) WEAK;
void __tsan_switch_to_fiber(void*, unsigned) WEAK;
void __tsan_acquire(void*) WEAK;
void __tsan_release(void*) WEAK;
void AnnotateIgnoreReadsBegin(const char*, int) WEAK;
void AnnotateIgnoreReadsEnd(const char*, int) WEAK;
void AnnotateIgnoreWritesBegin(const char*, int) WEAK;
void AnnotateIgnoreWritesEnd(const char*, int) WEAK;
}

namespace emulation {
namespace {

// Orders threads for ThreadSanitizer: what precedes release() happens before what follows acquire().
struct Moment {
  char address = 0;
  void release() {
    if (__tsan_release) __tsan_release(&address);
  }
  void acquire() {
    if (__tsan_acquire) __tsan_acquire(&address);
  }
};

// While it lives, ThreadSanitizer ignores memory accesses: those of the emulation (malloc and memcpy are intercepted)
// are not the kernel's.
class Unseen {
 public:
  Unseen() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    if (!AnnotateIgnoreReadsBegin) return;
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
};

}  // namespace
}  // namespace emulation
