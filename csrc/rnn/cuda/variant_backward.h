// The backward of one row and step with layer normalisation, zoneout and recurrent dropout (variant_rows.h), and the
// sums of its gradients over all rows.
#pragma once

#include "variant_rows.h"

namespace dlk {
namespace gpu {

// The gradient of a value before it was normalised. product: that of gradient and gain, rounded. mean and slope: the
// means over the part of these products, and of these times the normalised values.
DLK_DEVICE float before_norm(float product, float normalised, float mean, float slope, float scale) {
  return fmaf(-normalised, slope, product - mean) * scale;
}

template <class Cell, class S>
__global__ void __launch_bounds__(kVariantThreads, 1)
    variant_cell_backward(const __grid_constant__ VariantCellBackward p) {
  using Record = VariantRecord<Cell>;
  constexpr int kGates = Cell::kGates, kSide = kParts<Cell>;
  const StepVariant& v = p.variant;
  const int b = static_cast<int>(blockIdx.x), H = p.H;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int length = row_length(p.rows, p.B, b);
  const int64_t row = static_cast<int64_t>(b) * H;
  S* hidden = static_cast<S*>(p.hidden) + row * kGates;
  // The gradient of h' from the next step.
  const auto from_next = [&](int j) {
    if (!p.product) return p.dh[row + j];
    return fmaf(p.product[row + j], v.dropout ? v.dropout[row + j] : 1.0f, p.dh[row + j]);
  };
  if (p.rows.t >= length) {
    for (int j = thread; j < H; j += threads) p.dh[row + j] = from_next(j);
    for (int i = thread; i < kGates * H; i += threads) hidden[i] = from_float<S>(0.0f);
    if (p.rows.offsets) return;
    store_zeros<S>(p.of_input, b, kGates * H);
    store_zeros<S>(p.of_hidden, b, kGates * H);
    return;
  }

  const Record places(H, v.normalised);
  const float* record = p.saved.data + b * p.saved.stride;
  float* grads = p.grads.data + b * p.grads.stride;
  const int own_step = p.rows.reverse ? length - 1 - p.rows.t : p.rows.t;
  const bool cut = p.bptt_steps > 0 && own_step > 0 && own_step % p.bptt_steps == 0;
  const auto state_before = [&](int j, int slot, const void* first) {
    if (own_step > 0) return p.before.data[b * p.before.stride + places.slot(slot) + j];
    return first ? to_float(static_cast<const S*>(first)[row + j]) : 0.0f;
  };
  const auto slot = [&](int s, int j) { return Real<S>{record[places.slot(s) + j]}; };
  const Zoneout zone_h(p.mask_h, v.zoneout_h, row);
  // The gradient of the cell's own h'. What belongs to the old h goes to *kept.
  const auto of_output = [&](int j, float* kept) {
    float dy[1], own;
    load_state<1, S>(p.dy, b, j, dy);
    zone_h.divide(j, dy[0] + from_next(j), kept, &own);
    return own;
  };

  // The sums whose means before_norm() takes. Part k of W_ih x has the sum of its products at 2 * k and that of the
  // products times the normalised values at 2 * k + 1; those of W_hh h begin at 2 * kSide.
  float sums[4 * kSide] = {};
  const auto count_gate = [&](int g, int j, float of_x, float of_h) {
    if (!v.normalised) return;
    const int64_t at = static_cast<int64_t>(g) * H + j;
    const int part = 2 * part_of<Cell>(g);
    const float left = rounded_product(of_x, v.gains.ih[at]), right = rounded_product(of_h, v.gains.hh[at]);
    sums[part] += left;
    sums[part + 1] = fmaf(left, record[places.input() + at], sums[part + 1]);
    sums[2 * kSide + part] += right;
    sums[2 * kSide + part + 1] = fmaf(right, record[places.hidden() + at], sums[2 * kSide + part + 1]);
  };
  BlockSums block;

  if constexpr (Cell::kCellState) {
    constexpr int kOfSeenC = Cell::kGateGrads;  // where `grads` has the gradient of the c' that h' reads
    const float mean = v.normalised ? record[places.moments() + kMeanOfC] : 0.0f;
    const float scale = v.normalised ? record[places.moments() + kOfC] : 1.0f;
    const auto normalised_c = [&](int j) { return (record[places.slot(Cell::kC) + j] - mean) * scale; };
    const auto factors = [&](int j, Real<S> seen_c, Real<S>* to) {
      Real<S> slots[Cell::kSaved];
      DLK_UNROLL
      for (int s = 0; s < Cell::kStateSlot; ++s) slots[s] = slot(s, j);
      slots[Cell::kC] = seen_c;
      Cell::factors(slots, Real<S>{state_before(j, Record::kZonedC, p.c0)}, to);
    };
    float of_c[2] = {};
    for (int j = thread; j < H; j += threads) {
      float seen = record[places.slot(Cell::kC) + j];
      if (v.normalised) seen = fmaf(normalised_c(j), v.gains.c[j], v.gains.c_bias ? v.gains.c_bias[j] : 0.0f);
      Real<S> factor[Cell::kFactors];
      factors(j, Real<S>{seen}, factor);
      float kept;
      const float dh = of_output(j, &kept), of_seen = dh * factor[Cell::kFactorH].v;
      p.dh[row + j] = cut ? 0.0f : kept;
      grads[Cell::kO * H + j] = dh * factor[Cell::kFactorO].v;
      grads[kOfSeenC * H + j] = of_seen;
      if (!v.normalised) continue;
      const float product = rounded_product(of_seen, v.gains.c[j]);
      of_c[0] += product;
      of_c[1] = fmaf(product, normalised_c(j), of_c[1]);
    }
    if (v.normalised) {
      block.add(of_c);
      of_c[0] /= static_cast<float>(H), of_c[1] /= static_cast<float>(H);
    }
    const Zoneout zone_c(p.mask_c, v.zoneout_c, row);
    for (int j = thread; j < H; j += threads) {
      float dc = grads[kOfSeenC * H + j], kept, own;
      if (v.normalised) {
        dc = before_norm(rounded_product(dc, v.gains.c[j]), normalised_c(j), of_c[0], of_c[1], scale);
      }
      zone_c.divide(j, p.dc[row + j], &kept, &own);
      Real<S> factor[Cell::kFactors], through{dc + own}, dgates[Cell::kGateGrads];
      factors(j, Real<S>::zero(), factor);
      Cell::backward(factor, Real<S>::zero(), &through, dgates);  // without that of o, which is there already
      p.dc[row + j] = cut ? 0.0f : through.v + kept;
      DLK_UNROLL
      for (int g = 0; g < kGates; ++g) {
        if (g == Cell::kO) dgates[g].v = grads[g * H + j];
        grads[g * H + j] = dgates[g].v;
        count_gate(g, j, dgates[g].v, dgates[g].v);
      }
    }
  } else {
    for (int j = thread; j < H; j += threads) {
      float saved[Cell::kSaved], dgates[Cell::kGateGrads], kept, none = 0.0f;
      DLK_UNROLL
      for (int s = 0; s < Cell::kSaved; ++s) saved[s] = slot(s, j).v;
      const float dh = of_output(j, &kept), old_h = state_before(j, Record::kH, p.h0);
      const float direct = step_backward(false, backward_inputs<Cell, S>(saved, old_h), dh, &none, dgates);
      p.dh[row + j] = cut ? 0.0f : kept + direct;
      DLK_UNROLL
      for (int k = 0; k < Cell::kGateGrads; ++k) grads[k * H + j] = dgates[k];
      DLK_UNROLL
      for (int g = 0; g < kGates; ++g) count_gate(g, j, dgates[g], dgates[hidden_slot<Cell>(g)]);
    }
  }

  // Before the first step h is 0, so the row adds nothing to W_hh's gradient. Its products with W_hh were all 0, and
  // their gradient, which is multiplied by 1 / sqrt(eps), may be infinite in float16.
  const bool no_state = own_step == 0 && !p.h0;
  float scales[2 * kSide] = {};
  if (v.normalised) {
    block.add(sums);
    DLK_UNROLL
    for (int part = 0; part < kSide; ++part) {
      DLK_UNROLL
      for (int k = 0; k < 2; ++k) {
        sums[2 * part + k] /= static_cast<float>(part_gates<Cell>(part) * H);
        sums[2 * (kSide + part) + k] /= static_cast<float>(part_gates<Cell>(part) * H);
      }
      scales[part] = record[places.moments() + kOfInput + part];
      scales[kSide + part] = record[places.moments() + kOfHidden + part];
    }
  }
  for (int j = thread; j < H; j += threads) {
    DLK_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = static_cast<int64_t>(g) * H + j;
      float left[1] = {grads[at]}, right[1] = {grads[static_cast<int64_t>(hidden_slot<Cell>(g)) * H + j]};
      if (v.normalised) {
        const int of_x = part_of<Cell>(g), of_h = kSide + of_x;
        left[0] = before_norm(rounded_product(left[0], v.gains.ih[at]), record[places.input() + at], sums[2 * of_x],
                              sums[2 * of_x + 1], scales[of_x]);
        right[0] = before_norm(rounded_product(right[0], v.gains.hh[at]), record[places.hidden() + at], sums[2 * of_h],
                               sums[2 * of_h + 1], scales[of_h]);
      }
      store_state<1, S>(p.of_input, b, at, left);
      hidden[at] = from_float<S>(cut ? 0.0f : right[0]);
      if (no_state) right[0] = 0.0f;
      store_state<1, S>(p.of_hidden, b, at, right);
    }
  }
}

// A block has 32 columns of `grads`, and each of its 8 rows of threads every eighth row of a segment.
constexpr int kSumColumns = 32, kSumRows = 8;

template <class Cell>
__global__ void __launch_bounds__(kSumColumns* kSumRows) variant_sums(const __grid_constant__ VariantSums p) {
  using Record = VariantRecord<Cell>;
  const Record places(p.H, p.normalised);
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns, turn = static_cast<int>(threadIdx.x) / kSumColumns;
  const int columns = kVariantGrads<Cell> * p.H, column = static_cast<int>(blockIdx.x) * kSumColumns + lane;
  const int slot = column / p.H, unit = column % p.H;
  const int64_t each = (p.rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * each;
  const int64_t end = first + each < p.rows ? first + each : p.rows;
  // The gate whose products on the input side, and on the hidden side, this column is the gradient of; or none.
  const int input_gate = slot < Cell::kGates ? slot : kNone;
  const int hidden_gate = hidden_gate_of<Cell>(slot);
  float sums[kVariantSums] = {};
  for (int64_t r = first + turn; column < columns && r < end; r += kSumRows) {
    if (p.lengths) {
      const int t = static_cast<int>(r / p.B), b = static_cast<int>(r % p.B);
      if (t >= sequence_length(nullptr, p.lengths, p.T, p.B, b)) continue;
    }
    const float value = p.grads[r * columns + column];
    sums[0] += value;
    if (!p.normalised) continue;
    const float* record = p.saved + r * places.size;
    if (input_gate != kNone) {
      sums[1] = fmaf(value, record[places.input() + static_cast<int64_t>(input_gate) * p.H + unit], sums[1]);
    } else if (slot >= Cell::kGateGrads) {  // of the normalised c'
      const float* moments = record + places.moments();
      const float c = record[places.slot(Cell::kStateSlot) + unit];
      sums[1] = fmaf(value, (c - moments[kMeanOfC]) * moments[kOfC], sums[1]);
    }
    if (hidden_gate != kNone) {
      sums[2] = fmaf(value, record[places.hidden() + static_cast<int64_t>(hidden_gate) * p.H + unit], sums[2]);
    }
  }
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [turn][sum][lane]
  DLK_UNROLL
  for (int k = 0; k < kVariantSums; ++k) shared[(turn * kVariantSums + k) * kSumColumns + lane] = sums[k];
  __syncthreads();
  if (turn >= kVariantSums || column >= columns) return;
  float total = 0.0f;
  DLK_UNROLL
  for (int r = 0; r < kSumRows; ++r) total += shared[(r * kVariantSums + turn) * kSumColumns + lane];
  p.partial[(static_cast<int64_t>(blockIdx.y) * kVariantSums + turn) * columns + column] = total;
}

DLK_DEVICE void store_number(void* to, DType dtype, int64_t index, float value) {
  if (!to) return;
  if (dtype == DType::f32) static_cast<float*>(to)[index] = value;
  if (dtype == DType::bf16) static_cast<bf16_t*>(to)[index] = from_float<bf16_t>(value);
  if (dtype == DType::f16) static_cast<f16_t*>(to)[index] = from_float<f16_t>(value);
}

// Adds up the segments, in order.
template <class Cell>
__global__ void __launch_bounds__(kCellThreads) variant_results(const __grid_constant__ VariantSums p) {
  const int i = static_cast<int>(blockIdx.x) * kCellThreads + static_cast<int>(threadIdx.x);
  if (i >= Cell::kGates * p.H) return;
  const int gate = i / p.H, unit = i % p.H;
  const int64_t columns = static_cast<int64_t>(kVariantGrads<Cell>) * p.H;
  const auto total = [&](int slot, int which) {
    float sum = 0.0f;
    for (int s = 0; s < variant_segments(p.rows); ++s) {
      sum += p.partial[(static_cast<int64_t>(s) * kVariantSums + which) * columns + slot * p.H + unit];
    }
    return sum;
  };
  store_number(p.b_ih, p.of_weights, i, total(gate, 0));
  store_number(p.b_hh, p.of_weights, i, total(hidden_slot<Cell>(gate), 0));
  if (!p.normalised) return;
  store_number(p.gains.ih, p.gains.dtype, i, total(gate, 1));
  store_number(p.gains.hh, p.gains.dtype, i, total(hidden_slot<Cell>(gate), 2));
  if (!Cell::kCellState || gate > 0) return;
  store_number(p.gains.c, p.gains.dtype, i, total(Cell::kGateGrads, 1));
  store_number(p.gains.c_bias, p.gains.dtype, i, total(Cell::kGateGrads, 0));
}

}  // namespace gpu
}  // namespace dlk
