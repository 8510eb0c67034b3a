// The SIMD layer of every ISA this machine has, against libm and against plain loops.
#include <sys/mman.h>
#include <unistd.h>

#include <random>
#include <vector>

#include "simd/system.h"
#include "check.h"

namespace {

// A block whose end is the end of readable memory: one element too far is a crash.
class GuardedPage {
 public:
  GuardedPage() : bytes_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    base_ = static_cast<char*>(mmap(nullptr, 2 * bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + bytes_, bytes_, PROT_NONE);
  }
  ~GuardedPage() { munmap(base_, 2 * bytes_); }
  template <class S>
  S* last(int n) const {
    return reinterpret_cast<S*>(base_ + bytes_) - n;
  }

 private:
  size_t bytes_;
  char* base_;
};

// float is held against double, double against long double.
inline double wider(float x) { return x; }
inline long double wider(double x) { return x; }

template <class C, class R>
double error_in_ulps(C got, R want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : HUGE_VAL;
  if (got == static_cast<C>(want)) return 0;  // also where both are infinite
  if (std::isinf(got)) return HUGE_VAL;
  int exponent;
  std::frexp(want, &exponent);
  const int lowest = std::numeric_limits<C>::min_exponent;
  const R ulp = std::ldexp(R(1), std::max(exponent, lowest) - std::numeric_limits<C>::digits);
  return static_cast<double>(std::fabs(static_cast<R>(got) - want) / ulp);
}

// Every size of number: bit patterns at a stride coprime to 2 for float, random
// exponents for double; then the range where things happen, evenly.
std::vector<float> samples(float) {
  std::vector<float> out;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 6151)
    out.push_back(dlk::bits_float(static_cast<uint32_t>(bits)));
  for (int i = -200000; i <= 200000; ++i) out.push_back(static_cast<float>(i) * 5.3e-4f);
  return out;
}
std::vector<double> samples(double) {
  std::vector<double> out;
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> mantissa(-2, 2), exponent(-1074, 12), wide(-750, 750), narrow(-20, 20);
  for (int i = 0; i < 100000; ++i) out.push_back(std::ldexp(mantissa(random), static_cast<int>(exponent(random))));
  for (int i = 0; i < 100000; ++i) out.push_back(wide(random));
  for (int i = 0; i < 100000; ++i) out.push_back(narrow(random));
  return out;
}

struct MathErrors {
  double exp = 0, sigmoid = 0, tanh = 0;
};

inline bool same_bits(float a, float b) { return dlk::float_bits(a) == dlk::float_bits(b); }

}  // namespace

namespace dlk::scalar {
#include "simd/scalar.h"
#include "simd/math.h"
#include "simd_test_body.h"
}  // namespace dlk::scalar

#ifdef DLK_X86
DLK_TARGET_BEGIN(DLK_TARGET_AVX2)
namespace dlk::avx2 {
#include "simd/avx2.h"
#include "simd/math.h"
#include "simd_test_body.h"
}  // namespace dlk::avx2
DLK_TARGET_END

DLK_TARGET_BEGIN(DLK_TARGET_AVX512)
namespace dlk::avx512 {
#include "simd/avx512.h"
#include "simd/math.h"
#include "simd_test_body.h"
}  // namespace dlk::avx512
DLK_TARGET_END
#endif

int main() {
  dlk::scalar::test_isa("scalar");
#ifdef DLK_X86
  if (has_avx2()) {
    dlk::avx2::test_isa("avx2");
  } else {
    std::printf("simd_test: avx2 not tested, this machine has none\n");
  }
  if (has_avx512()) {
    dlk::avx512::test_isa("avx512");
  } else {
    std::printf("simd_test: avx512 not tested, this machine has none\n");
  }
#endif
  return report("simd_test");
}
