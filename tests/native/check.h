// A counter of failures and the one macro the native tests check with.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

// Prints the first twenty, counts all.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++failures() <= 20) {                     \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

inline int report(const char* name) {
  std::printf("%s: %s (%d failures)\n", name, failures() ? "FAILED" : "ok", failures());
  return failures() ? 1 : 0;
}
