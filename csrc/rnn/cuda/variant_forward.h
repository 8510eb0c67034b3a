// The forward of one row and step with layer normalisation, zoneout and recurrent dropout (variant_rows.h).
#pragma once

#include "variant_rows.h"

namespace dlk {
namespace gpu {

// The mean and the reciprocal standard deviation of each part of W_ih x, and behind them those of W_hh h.
template <class Cell>
struct ProductMoments {
  static constexpr int kCount = 2 * kParts<Cell>;
  float mean[kCount], scale[kCount];

  // The variance is that of the values around their mean, not a difference of two large sums.
  DLK_DEVICE void find(const float* x, const float* hidden, int H, float eps, BlockSums* block) {
    constexpr int kSide = kParts<Cell>;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    float sums[kCount] = {}, squares[kCount] = {};
    for (int j = thread; j < H; j += threads) {
      DLK_UNROLL
      for (int g = 0; g < Cell::kGates; ++g) {
        const int64_t at = static_cast<int64_t>(g) * H + j;
        sums[part_of<Cell>(g)] += x[at];
        sums[kSide + part_of<Cell>(g)] += hidden[at];
      }
    }
    block->add(sums);
    DLK_UNROLL
    for (int k = 0; k < kCount; ++k) mean[k] = sums[k] / static_cast<float>(part_gates<Cell>(k % kSide) * H);
    for (int j = thread; j < H; j += threads) {
      DLK_UNROLL
      for (int g = 0; g < Cell::kGates; ++g) {
        const int64_t at = static_cast<int64_t>(g) * H + j;
        const float of_x = x[at] - mean[part_of<Cell>(g)], of_h = hidden[at] - mean[kSide + part_of<Cell>(g)];
        squares[part_of<Cell>(g)] = fmaf(of_x, of_x, squares[part_of<Cell>(g)]);
        squares[kSide + part_of<Cell>(g)] = fmaf(of_h, of_h, squares[kSide + part_of<Cell>(g)]);
      }
    }
    block->add(squares);
    DLK_UNROLL
    for (int k = 0; k < kCount; ++k) {
      scale[k] = 1.0f / sqrtf(squares[k] / static_cast<float>(part_gates<Cell>(k % kSide) * H) + eps);
    }
  }
};

template <class Cell, class S>
__global__ void __launch_bounds__(kVariantThreads, 1)
    variant_cell_forward(const __grid_constant__ VariantCellForward p) {
  using Record = VariantRecord<Cell>;
  constexpr int kGates = Cell::kGates, kSide = kParts<Cell>;
  const StepVariant& v = p.variant;
  const int b = static_cast<int>(blockIdx.x), H = p.H;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (p.rows.t >= row_length(p.rows, p.B, b)) {
    if (!p.rows.offsets) store_zeros<S>(p.y, b, H);
    return;
  }
  const int64_t row = static_cast<int64_t>(b) * H;
  const float* x = p.gates_x.data + b * p.gates_x.stride;
  float* hidden = p.gates_h + row * kGates;
  float* record = p.saved.data ? p.saved.data + b * p.saved.stride : nullptr;
  const Record places(H, v.normalised);
  BlockSums block;
  ProductMoments<Cell> moments{};
  if (v.normalised) {
    moments.find(x, hidden, H, v.eps, &block);
    if (record && thread == 0) {
      DLK_UNROLL
      for (int part = 0; part < kSide; ++part) {
        record[places.moments() + kOfInput + part] = moments.scale[part];
        record[places.moments() + kOfHidden + part] = moments.scale[kSide + part];
      }
    }
  }

  // What enters the gates of unit j: the products, normalised, and their biases.
  const auto inputs = [&](int j, float* xs, float* hs) {
    DLK_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = static_cast<int64_t>(g) * H + j;
      xs[g] = x[at], hs[g] = hidden[at];
      if (v.normalised) {
        const int part = part_of<Cell>(g);
        xs[g] = (xs[g] - moments.mean[part]) * moments.scale[part];
        hs[g] = (hs[g] - moments.mean[kSide + part]) * moments.scale[kSide + part];
        if (record) record[places.input() + at] = xs[g], record[places.hidden() + at] = hs[g];
        xs[g] *= v.gains.ih[at], hs[g] *= v.gains.hh[at];
      }
      if (v.b_ih) xs[g] += v.b_ih[at], hs[g] += v.b_hh[at];
    }
  };
  const Zoneout zone_h(p.mask_h, v.zoneout_h, row);
  const auto emit = [&](int j, float value) {
    const float h[1] = {zone_h.mix(j, p.h[row + j], value)};
    p.h[row + j] = h[0];
    static_cast<S*>(p.h_n)[row + j] = from_float<S>(h[0]);
    if (p.operand) static_cast<S*>(p.operand)[row + j] = from_float<S>(h[0] * v.dropout[row + j]);
    store_state<1, S>(p.y, b, j, h);
    if (record) record[places.slot(Record::kH) + j] = h[0];
  };

  if constexpr (Cell::kCellState) {
    const Zoneout zone_c(p.mask_c, v.zoneout_c, row);
    float sum[1] = {}, squares[1] = {};
    for (int j = thread; j < H; j += threads) {
      float xs[kGates], hs[kGates];
      inputs(j, xs, hs);
      Real<S> in[kGates], with[kGates], slots[Cell::kSaved];
      DLK_UNROLL
      for (int g = 0; g < kGates; ++g) in[g] = {xs[g]}, with[g] = {hs[g]};
      const float before = p.c[row + j];
      Cell::gates(in, with, Real<S>{before}, slots);
      const float c = slots[Cell::kC].v, next = zone_c.mix(j, before, c);
      p.c[row + j] = next;
      static_cast<S*>(p.c_n)[row + j] = from_float<S>(next);
      if (record) {
        DLK_UNROLL
        for (int s = 0; s < Cell::kSaved; ++s) record[places.slot(s) + j] = slots[s].v;
        record[places.slot(Record::kZonedC) + j] = next;
      }
      if (v.normalised) {
        // The products of this unit are not needed any more, so their place keeps c' and o.
        hidden[j] = c;
        hidden[H + j] = slots[Cell::kO].v;
        sum[0] += c;
      } else {
        emit(j, slots[Cell::kO].v * tanh(slots[Cell::kC]).v);
      }
    }
    if (!v.normalised) return;
    block.add(sum);
    const float mean = sum[0] / static_cast<float>(H);
    for (int j = thread; j < H; j += threads) {
      const float from_mean = hidden[j] - mean;
      squares[0] = fmaf(from_mean, from_mean, squares[0]);
    }
    block.add(squares);
    const float scale = 1.0f / sqrtf(squares[0] / static_cast<float>(H) + v.eps);
    if (record && thread == 0) {
      record[places.moments() + kMeanOfC] = mean;
      record[places.moments() + kOfC] = scale;
    }
    for (int j = thread; j < H; j += threads) {
      const float seen = fmaf((hidden[j] - mean) * scale, v.gains.c[j], v.gains.c_bias ? v.gains.c_bias[j] : 0.0f);
      emit(j, hidden[H + j] * tanh(Real<S>{seen}).v);
    }
  } else {
    for (int j = thread; j < H; j += threads) {
      float xs[kGates], hs[kGates], saved[Cell::kSaved];
      inputs(j, xs, hs);
      const float h = step_forward<Cell, S>(false, xs, hs, p.h[row + j], saved);
      DLK_UNROLL
      for (int s = 0; s < Cell::kStateSlot && record; ++s) record[places.slot(s) + j] = saved[s];
      emit(j, h);
    }
  }
}

}  // namespace gpu
}  // namespace dlk
