// Tests Bf16Unit, the products of bfloat16: their emulation and, where the machine has them, the instructions
// themselves (bf16_test_of_isa.cpp).
#include "check.h"
#include "simd/target.h"

#ifdef DLK_X86

#include <sys/syscall.h>
#include <unistd.h>

bool test_emulated_amx(const char* kind);
bool test_emulated_avx512_bf16(const char* kind);
bool test_amx(const char* kind);
bool test_avx512_bf16(const char* kind);

namespace {

bool has_bit(unsigned leaf, unsigned subleaf, int word, int index) {  // words: eax, ebx, ecx, edx
  unsigned r[4] = {leaf, 0, subleaf, 0};
  __asm__("cpuid" : "+a"(r[0]), "=b"(r[1]), "+c"(r[2]), "=d"(r[3]));
  return r[word] >> index & 1;
}
bool has_tiles() { return has_bit(7, 0, 3, 22) && has_bit(7, 0, 3, 24) && syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
bool has_dots() { return has_bit(7, 1, 0, 5); }

}  // namespace

int main() {
  if (!has_avx512()) {
    std::printf("bf16_test: nothing tested, the emulation is written for AVX-512\n");
    return 0;
  }
  CHECK(test_emulated_amx("emulated tiles"), "not compiled");
  CHECK(test_emulated_avx512_bf16("emulated dots"), "not compiled");
  if (!has_tiles() || !test_amx("tiles")) std::printf("bf16_test: no AMX here, only its emulation is tested\n");
  if (!has_dots() || !test_avx512_bf16("dots"))
    std::printf("bf16_test: no AVX512_BF16 here, only its emulation is tested\n");
  return report("bf16_test");
}

#else

int main() {
  std::printf("bf16_test: nothing tested, this is no x86\n");
  return 0;
}

#endif  // DLK_X86
