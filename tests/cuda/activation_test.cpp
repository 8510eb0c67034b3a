// The activations of 16-bit layers against double precision, with the errors of the approximate instructions that the
// emulation makes: over all magnitudes, and where exponentials overflow.
#include <cmath>
#include <cstdio>
#include <limits>

#include "rnn/cuda/real.h"

namespace {

using V = dlk::gpu::Real<dlk::bf16_t>;
int failures = 0;

void expect(const char* name, float x, double got, double exact, double relative) {
  const double error = std::fabs(got - exact);
  if (std::isnan(exact) ? std::isnan(got) : error <= relative * std::fabs(exact)) return;
  if (++failures < 10) std::printf("%s(%.9g) is %.9g, not %.9g\n", name, x, got, exact);
}

void check(float x) {
  // Within 2^-17 of the result: 2^-18 from the series near 0, less elsewhere.
  expect("tanh", x, tanh(V{x}).v, std::tanh(static_cast<double>(x)), 0x1p-17);
  // Results below the smallest normal number may be 0.
  const double exact = 1 / (1 + std::exp(-static_cast<double>(x)));
  const float got = sigmoid(V{x}).v;
  if (exact > 0x1p-124) expect("sigmoid", x, got, exact, 0x1p-17);
  if (exact <= 0x1p-124 && !(got >= 0 && got <= 0x1p-123f)) expect("sigmoid", x, got, 0, 0);
}

}  // namespace

int main() {
  for (float magnitude = 0x1p-140f; magnitude < 0x1p100f; magnitude *= 1.0078125f) check(magnitude), check(-magnitude);
  for (int i = -20000; i <= 20000; ++i) check(static_cast<float>(i) / 1024);
  for (float x : {0.0f, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                  std::numeric_limits<float>::quiet_NaN()}) {
    expect("tanh", x, tanh(V{x}).v, std::tanh(static_cast<double>(x)), 0x1p-20);
    expect("sigmoid", x, sigmoid(V{x}).v, 1 / (1 + std::exp(-static_cast<double>(x))), 0x1p-20);
  }
  std::printf("%d errors%s\n", failures, failures ? "" : ", all bounds hold");
  return failures > 0;
}
