// What the forward and the backward of a row with layer normalisation and zoneout share. A block has one row, and each
// of its threads has the units that are `blockDim.x` apart, in every step of the computation. So threads exchange sums
// only, and each reads again what it has written itself.
#pragma once

#include "cell_kernels.h"
#include "variants.h"

namespace dlk {
namespace gpu {

// The most threads of a block. The kernels have __launch_bounds__(kVariantThreads, 1): with one block on a
// multiprocessor ptxas may use all of its registers, and otherwise it spills some.
constexpr int kVariantThreads = 512;
constexpr int kMostSums = 8;  // the most sums of one BlockSums::add()

// Adds up numbers over the threads of the block, in an order that depends on the number of threads alone. All threads
// call it together. The partial sums of the warps alternate between two buffers: a thread that writes to a buffer has
// passed the barrier of the call before, which all threads reach after their last reads of that buffer.
class BlockSums {
 public:
  static constexpr int bytes(int threads) { return 2 * (threads / 32) * kMostSums * static_cast<int>(sizeof(float)); }

  template <int kCount>
  DLK_DEVICE void add(float (&values)[kCount]) {
    static_assert(kCount <= kMostSums);
    DLK_UNROLL
    for (int i = 0; i < kCount; ++i) {
      DLK_UNROLL
      for (int lanes = 16; lanes > 0; lanes /= 2) values[i] += __shfl_xor_sync(~0u, values[i], lanes);
    }
    const int warps = static_cast<int>(blockDim.x) / 32, thread = static_cast<int>(threadIdx.x);
    if (warps == 1) return;
    float* parts = reinterpret_cast<float*>(dynamic_shared()) + turn_ * warps * kMostSums;
    turn_ ^= 1;
    if (thread % 32 == 0) {
      DLK_UNROLL
      for (int i = 0; i < kCount; ++i) parts[thread / 32 * kMostSums + i] = values[i];
    }
    __syncthreads();
    DLK_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = 0.0f;
    for (int w = 0; w < warps; ++w) {
      DLK_UNROLL
      for (int i = 0; i < kCount; ++i) values[i] += parts[w * kMostSums + i];
    }
  }

 private:
  int turn_ = 0;
};

// The parts of G*H products that are normalised together: all of the lstm's; of the gru r and z, and n.
template <class Cell>
constexpr int kParts = Cell::kHasPartedGate ? 2 : 1;
template <class Cell>
DLK_DEVICE constexpr int part_of(int gate) {
  return Cell::kHasPartedGate && gate == Cell::kPartedGate ? 1 : 0;
}

template <class Cell>
DLK_DEVICE constexpr int part_gates(int part) {
  return !Cell::kHasPartedGate ? Cell::kGates : part == 0 ? Cell::kPartedGate : 1;
}

// a * b, rounded: a compiler may not contract it with a later subtraction. Where a mean is subtracted from such a
// product, what should cancel would otherwise leave a rounding error, which is then multiplied by up to 1 / sqrt(eps).
DLK_DEVICE float rounded_product(float a, float b) { return fmaf(a, b, 0.0f); }

// Which part of a state of one row keeps its old value: a mask, or a rate.
struct Zoneout {
  const uint8_t* mask;
  float rate;

  DLK_DEVICE Zoneout(const uint8_t* mask, float rate, int64_t row) : mask(mask ? mask + row : nullptr), rate(rate) {}

  DLK_DEVICE float mix(int j, float old_value, float new_value) const {
    if (mask) return mask[j] ? old_value : new_value;
    return rate == 0.0f ? new_value : fmaf(rate, old_value, (1.0f - rate) * new_value);
  }
  // Divides the gradient of the result into those of the old and of the new value.
  DLK_DEVICE void divide(int j, float gradient, float* of_old, float* of_new) const {
    if (mask || rate == 0.0f) {
      const bool keeps = mask && mask[j];
      *of_old = keeps ? gradient : 0.0f;
      *of_new = keeps ? 0.0f : gradient;
    } else {
      *of_old = rate * gradient;
      *of_new = (1.0f - rate) * gradient;
    }
  }
};

template <class S>
DLK_DEVICE void store_zeros(const StateRows<void*>& rows, int b, int count) {
  if (!rows.data) return;
  const float zero[1] = {0.0f};
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    store_state<1, S>(rows, b, i, zero);
  }
}

}  // namespace gpu
}  // namespace dlk
