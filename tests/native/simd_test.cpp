// Tests the SIMD layer of every instruction set of this machine that has its own vector types (simd_test_of_isa.cpp).
#include "check.h"
#include "simd/target.h"

void test_scalar();
void test_avx2();
void test_avx512();

int main() {
  test_scalar();
#ifdef DLK_X86
  if (has_avx2()) {
    test_avx2();
  } else {
    std::printf("simd_test: avx2 not tested, this machine has none\n");
  }
  if (has_avx512()) {
    test_avx512();
  } else {
    std::printf("simd_test: avx512 not tested, this machine has none\n");
  }
#endif
  return report("simd_test");
}
