// The check macro of the native tests, and the counter of its failures.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

// Prints the first twenty failures and counts all of them.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++failures() <= 20) {                     \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

#if defined(__x86_64__)
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
// True also where AVX-512 is emulated.
inline bool has_avx512() {
#ifdef DLK_EMULATE_AVX512
  return has_avx2();
#else
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
}
#endif

inline int report(const char* name) {
  std::printf("%s: %s (%d failures)\n", name, failures() ? "FAILED" : "ok", failures());
  return failures() ? 1 : 0;
}
