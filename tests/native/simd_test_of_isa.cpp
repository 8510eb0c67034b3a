// Tests the SIMD layer of one instruction set against libm and against plain loops. run.sh compiles this file once for
// each instruction set, with DLK_ISA as its name.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "simd/fixed16.h"
#include "simd/vec.h"

#define DLK_STRING_OF(text) #text
#define DLK_STRING(name) DLK_STRING_OF(name)

namespace {

// A block of memory that ends at a protected page, so that an access beyond its end crashes.
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

// The type of the reference: double for float, long double for double.
inline double wider(float x) { return x; }
inline long double wider(double x) { return x; }

template <class C, class R>
double error_in_ulps(C got, R want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : HUGE_VAL;
  if (got == static_cast<C>(want)) return 0;  // includes equal infinities
  if (std::isinf(got)) return HUGE_VAL;
  int exponent;
  std::frexp(want, &exponent);
  const int lowest = std::numeric_limits<C>::min_exponent;
  const R ulp = std::ldexp(R(1), std::max(exponent, lowest) - std::numeric_limits<C>::digits);
  return static_cast<double>(std::fabs(static_cast<R>(got) - want) / ulp);
}

// Numbers of every magnitude (for float, bit patterns at an odd stride; for double, random exponents), then evenly
// spaced or uniform numbers from the range where the functions neither overflow nor saturate.
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

DLK_ISA_BEGIN

template <class C>
void test_memory(const char* isa) {
  constexpr int size = Vec<C>::size;
  const GuardedPage page;
  for (int n = 0; n <= size; ++n) {
    C* p = page.last<C>(n);
    for (int i = 0; i < n; ++i) p[i] = C(i + 1);
    C lanes[size];
    Vec<C>::load(p, n).store(lanes);
    for (int i = 0; i < size; ++i) CHECK(lanes[i] == (i < n ? C(i + 1) : C(0)), "%s n=%d lane %d", isa, n, i);
    Vec<C>::set1(C(7)).store(p, n);
    for (int i = 0; i < n; ++i) CHECK(p[i] == C(7), "%s n=%d lane %d", isa, n, i);
    C around[size + 1];
    for (C& x : around) x = C(-1);
    Vec<C>::set1(C(7)).store(around, n);
    for (int i = 0; i <= size; ++i) CHECK(around[i] == (i < n ? C(7) : C(-1)), "%s n=%d lane %d", isa, n, i);
  }
}

// Loads and stores of 16-bit storage at every partial length, at the end of readable memory.
template <class S>
void test_partial_storage(const char* isa) {
  constexpr int size = Vec<float>::size;
  const GuardedPage page;
  for (int n = 0; n <= size; ++n) {
    S* p = page.last<S>(n);
    store_as(p, Vec<float>::set1(1.5f), n);
    for (int i = 0; i < n; ++i) CHECK(to_float(p[i]) == 1.5f, "%s n=%d lane %d", isa, n, i);
    float lanes[size];
    load_as<float>(p, n).store(lanes);
    for (int i = 0; i < size; ++i) CHECK(lanes[i] == (i < n ? 1.5f : 0.0f), "%s n=%d lane %d", isa, n, i);
    S around[size + 1];
    for (S& x : around) x.bits = 0xabcd;
    store_as(around, Vec<float>::set1(0.0f), n);
    for (int i = 0; i <= size; ++i) CHECK(around[i].bits == (i < n ? 0 : 0xabcd), "%s n=%d lane %d", isa, n, i);
  }
}

inline bf16 rounded(bf16, float x) { return to_bf16(x); }
inline f16 rounded(f16, float x) { return to_f16(x); }

// Widens every 16-bit value, and narrows every such value, the midpoints between neighbours and the floats next to
// each, bit for bit.
template <class S>
void test_conversions(const char* isa) {
  constexpr int size = Vec<float>::size;
  S stored[size], back[size];
  float lanes[size];
  for (uint32_t start = 0; start < 65536; start += size) {
    for (int i = 0; i < size; ++i) stored[i].bits = static_cast<uint16_t>(start + i);
    load_as<float>(stored).store(lanes);
    for (int i = 0; i < size; ++i) {
      CHECK(same_bits(lanes[i], to_float(stored[i])), "%s %04x", isa, stored[i].bits);
    }
    for (int half = 0; half < 2; ++half) {
      for (int off = -1; off <= 1; ++off) {
        float inputs[size];
        for (int i = 0; i < size; ++i) {
          // The midpoint to the next stored value, which depends on the size of the step between the two.
          const float next = to_float(S{static_cast<uint16_t>(stored[i].bits + 1)});
          const float middle = half ? to_float(stored[i]) + 0.5f * (next - to_float(stored[i])) : to_float(stored[i]);
          inputs[i] = bits_float(float_bits(middle) + static_cast<uint32_t>(off));
        }
        store_as(back, Vec<float>::load(inputs));
        for (int i = 0; i < size; ++i) {
          CHECK(back[i].bits == rounded(S{}, inputs[i]).bits, "%s %08x", isa, float_bits(inputs[i]));
        }
      }
    }
  }
}

// Stores the values of all steps, the midpoints between them, and NaN, at every length; loads give the nearest step.
inline void test_fixed(const char* isa) {
  constexpr int size = Vec<float>::size;
  const GuardedPage page;
  float lanes[size];
  for (int half = -2 * 32767; half <= 2 * 32767; ++half) {
    const int n = (half & 0xffff) % (size + 1);
    const float x = half / 2.0f / 32767.0f;
    fixed16* p = page.last<fixed16>(n);
    store_fixed(p, Vec<float>::set1(x), n);
    load_fixed(p, n).store(lanes);
    for (int i = 0; i < size; ++i)
      CHECK(i < n ? std::fabs(lanes[i] - x) <= 0.51f / 32767 : lanes[i] == 0, "%s %g lane %d: %g", isa, x, i, lanes[i]);
    if (n && half % 2 == 0) CHECK(p->steps == half / 2, "%s %d: %d", isa, half / 2, p->steps);
  }
  fixed16 around[size + 1];
  for (int n = 0; n <= size; ++n) {
    for (fixed16& x : around) x.steps = 7;
    store_fixed(around, Vec<float>::set1(std::nanf("")), n);
    load_fixed(around, size).store(lanes);
    for (int i = 0; i <= size; ++i) CHECK(around[i].steps == (i < n ? -32768 : 7), "%s n=%d lane %d", isa, n, i);
    for (int i = 0; i < size; ++i) CHECK(std::isnan(lanes[i]) == (i < n), "%s n=%d lane %d", isa, n, i);
  }
}

template <class C>
void test_shuffles(const char* isa) {
  constexpr int size = Vec<C>::size;
  std::mt19937 random(2);
  std::uniform_real_distribution<C> uniform(-1, 1);
  Vec<C> rows[size];
  C lanes[size];
  for (int r = 0; r < size; ++r) {
    for (C& x : lanes) x = uniform(random);
    rows[r] = Vec<C>::load(lanes);
  }
  C sums[size];
  reduce_rows(rows).store(sums);
  for (int r = 0; r < size; ++r) {
    rows[r].store(lanes);
    long double want = 0;
    for (C x : lanes) want += x;
    CHECK(std::fabs(sums[r] - want) < size * std::numeric_limits<C>::epsilon(), "%s row %d", isa, r);
    CHECK(sums[r] == hsum(rows[r]), "%s row %d: hsum and reduce_rows add in one order", isa, r);
  }

  constexpr int ld = size + 3;
  C src[size * ld];
  for (int i = 0; i < size * ld; ++i) src[i] = C(i + 1);
  for (int n = 1; n <= size; ++n) {
    for (int m = 1; m <= size; ++m) {
      C dst[(size + 1) * ld];
      for (C& x : dst) x = C(-1);
      transpose_block(src, ld, n, m, dst, ld);
      for (int c = 0; c <= size; ++c) {
        for (int r = 0; r < ld; ++r) {
          const C want = c >= m || r >= size ? C(-1) : r < n ? src[r * ld + c] : C(0);
          CHECK(dst[c * ld + r] == want, "%s %dx%d at %d,%d", isa, n, m, r, c);
        }
      }
    }
  }
}

template <class C>
void test_arithmetic(const char* isa) {
  constexpr int size = Vec<C>::size;
  const C nan = std::numeric_limits<C>::quiet_NaN();
  const C values[] = {C(-2), C(0), C(3), nan};
  for (C a : values) {
    for (C b : values) {
      const Vec<C> x = Vec<C>::set1(a), y = Vec<C>::set1(b);
      const struct {
        const char* name;
        Vec<C> got;
        C want;
      } cases[] = {{"+", x + y, a + b},
                   {"-", x - y, a - b},
                   {"*", x * y, a * b},
                   {"/", x / y,
                    a == 0 && b == 0 ? nan
                    : b == 0         ? std::copysign(C(1), a) * C(HUGE_VAL) * (a == a ? 1 : nan)
                                     : a / b},
                   {"negate", -x, -a},
                   {"fma", fma(x, y, x), a * b + a},
                   {"fnma", fnma(x, y, x), a - a * b},
                   {"min", min(x, y), a < b ? a : b},
                   {"max", max(x, y), a > b ? a : b},
                   {"abs", abs(x), std::fabs(a)},
                   {"copysign", copysign(x, y), std::copysign(a, b)},
                   {"select_gt", select_gt(x, y, x, y), a > b ? a : b},
                   {"select_lt", select_lt(x, y, x, y), a < b ? a : b},
                   {"select_le", select_le(x, y, x, y), a <= b ? a : b},
                   {"relu", relu(x), a == a ? std::max(a, C(0)) : nan}};
      for (const auto& c : cases) {
        C lanes[size];
        c.got.store(lanes);
        for (C got : lanes) {
          CHECK(got == c.want || (std::isnan(got) && std::isnan(c.want)), "%s %s(%g, %g) = %g", isa, c.name, double(a),
                double(b), double(got));
        }
      }
    }
  }
}

template <class C>
MathErrors test_math(const char* isa) {
  constexpr int size = Vec<C>::size;
  const C inf = std::numeric_limits<C>::infinity(), nan = std::numeric_limits<C>::quiet_NaN();
  const C least = std::numeric_limits<C>::denorm_min(), most = std::numeric_limits<C>::max();
  std::vector<C> inputs = samples(C(0));
  for (C x : {C(0), C(1), least, std::numeric_limits<C>::min(), most, inf, nan}) {
    inputs.push_back(x);
    inputs.push_back(-x);
  }
  MathErrors worst;
  for (size_t start = 0; start < inputs.size(); start += size) {
    const int n = static_cast<int>(std::min<size_t>(size, inputs.size() - start));
    const Vec<C> x = Vec<C>::load(&inputs[start], n);
    C exps[size], sigmoids[size], tanhs[size];
    exp(x).store(exps);
    sigmoid(x).store(sigmoids);
    tanh(x).store(tanhs);
    for (int i = 0; i < n; ++i) {
      const auto at = wider(inputs[start + i]);
      using R = decltype(at + 0);
      const R e = std::exp(at);
      worst.exp = std::max(worst.exp, error_in_ulps(exps[i], e));
      worst.tanh = std::max(worst.tanh, error_in_ulps(tanhs[i], static_cast<R>(std::tanh(at))));
      const R s = at < 0 ? e / (1 + e) : 1 / (1 + std::exp(-at));
      // A sigmoid below the normal range may be flushed to 0.
      if (s >= std::numeric_limits<C>::min() || std::isnan(s)) {
        worst.sigmoid = std::max(worst.sigmoid, error_in_ulps(sigmoids[i], s));
      } else {
        CHECK(sigmoids[i] >= 0 && sigmoids[i] <= std::numeric_limits<C>::min(), "%s sigmoid(%g)", isa, double(at));
      }
      CHECK(std::isnan(at) || std::signbit(tanhs[i]) == std::signbit(at), "%s sign of tanh(%g)", isa, double(at));
      CHECK(!(std::fabs(tanhs[i]) > 1) && !(sigmoids[i] > 1), "%s beyond 1 at %g", isa, double(at));
    }
  }
  C lanes[size];
  sigmoid(Vec<C>::set1(-inf)).store(lanes);
  CHECK(lanes[0] == 0, "%s", isa);
  return worst;
}

template <class C, bool kRough>
void test_exp2_down(const char* isa) {
  using V = Vec<C>;
  constexpr C eps = std::numeric_limits<C>::epsilon();
  C residual[V::size];
  fma(V::set1(1 + eps), V::set1(1 - eps), V::set1(-1)).store(residual);
  for (const C factor : {C(1.4426950408889634), C(0.18), C(1e-19), C(37)}) {
    const Exp2Down<C, kRough> exp2(factor);
    for (int i = -1000; i <= 40; ++i) {
      const C x = static_cast<C>(i) * (ExpConstants<C>::n_max + 5) / (1000 * factor);
      C got[V::size];
      exp2(V::set1(x)).store(got);
      const auto want = std::exp2(wider(x) * wider(factor));
      // Without an fma the product x * factor is rounded before the exponential.
      const double rounding = residual[0] != 0 ? 0 : std::fabs(static_cast<double>(x * factor));
      if (want < 2 * std::numeric_limits<C>::min()) {
        CHECK(got[0] >= 0 && got[0] <= 2 * std::numeric_limits<C>::min(), "%s 2^%g", isa, double(x * factor));
      } else {
        const double most = kRough ? 3e-6 / std::numeric_limits<C>::epsilon() * 2 : 0;
        CHECK(error_in_ulps(got[0], want) < 1.2 + most + rounding, "%s 2^%g", isa, double(x * factor));
      }
      CHECK(i != 0 || got[0] == 1, "%s 2^0 = %.9g", isa, double(got[0]));
    }
    C got[V::size];
    exp2(V::set1(-std::numeric_limits<C>::infinity())).store(got);
    CHECK(got[0] == 0, "%s 2^-inf", isa);
    exp2(V::set1(std::numeric_limits<C>::quiet_NaN())).store(got);
    CHECK(std::isnan(got[0]), "%s 2^nan", isa);
  }
}

template <class C>
void test_type(const char* isa, const char* type) {
  test_exp2_down<C, false>(isa);
  test_memory<C>(isa);
  test_shuffles<C>(isa);
  test_arithmetic<C>(isa);
  const MathErrors worst = test_math<C>(isa);
  std::printf("%s %s: error in ulps exp %.2f sigmoid %.2f tanh %.2f\n", isa, type, worst.exp, worst.sigmoid,
              worst.tanh);
  CHECK(worst.exp < 1.1, "%s %s", isa, type);
  CHECK(worst.sigmoid < 2.5, "%s %s", isa, type);
  CHECK(worst.tanh < 2, "%s %s", isa, type);
}

inline void test_isa(const char* isa) {
  test_type<float>(isa, "float");
  test_exp2_down<float, true>(isa);
  test_type<double>(isa, "double");
  test_partial_storage<bf16>(isa);
  test_partial_storage<f16>(isa);
  test_conversions<bf16>(isa);
  test_conversions<f16>(isa);
  test_fixed(isa);
}

DLK_ISA_END

void DLK_JOIN(test_, DLK_ISA)() { dlk::DLK_ISA_NAMESPACE::test_isa(DLK_STRING(DLK_ISA)); }
