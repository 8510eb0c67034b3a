// The pointwise half of a step: biases, gates, states, and in the backward their gradients and those of the biases.
//
// Grid: x = rows, y = units. A block has 32 threads along the units, of which each takes `kWidth` adjacent ones (4 if
// everything is aligned, else 1), by 8 threads along the rows. In the backward a block takes kSegmentRows rows, adds up
// the gate gradients of each unit in a fixed order and writes the sum of its segment. There are no atomics, so results
// are the same every time.
#pragma once

#include "cell.h"
#include "walk.h"

namespace dlk {
namespace gpu {

constexpr int kUnitThreads = 32, kRowThreads = 8, kCellThreads = kUnitThreads * kRowThreads;

// Loads kWidth items from `at`, which the caller has checked to be aligned.
template <int kWidth, class S>
DLK_DEVICE void load_items(const S* at, float* to) {
  if constexpr (kWidth == 1) {
    to[0] = to_float(*at);
  } else if constexpr (sizeof(S) == 4) {
    const float4 v = *reinterpret_cast<const float4*>(at);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    S items[4];
    memcpy(static_cast<void*>(items), &v, sizeof v);
    DLK_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = to_float(items[i]);
  }
}

template <int kWidth, class S>
DLK_DEVICE void store_items(S* at, const float* from) {
  if constexpr (kWidth == 1) {
    *at = from_float<S>(from[0]);
  } else if constexpr (sizeof(S) == 4) {
    *reinterpret_cast<float4*>(at) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    const S items[4] = {from_float<S>(from[0]), from_float<S>(from[1]), from_float<S>(from[2]), from_float<S>(from[3])};
    uint2 v;
    memcpy(&v, items, sizeof v);
    *reinterpret_cast<uint2*>(at) = v;
  }
}

template <int kWidth, class S, class Pointer>
DLK_DEVICE void load_state(const StateRows<Pointer>& rows, int64_t b, int64_t j, float* to) {
  if (!rows.data) {
    DLK_UNROLL
    for (int i = 0; i < kWidth; ++i) to[i] = 0.0f;
  } else if (rows.f32) {
    load_items<kWidth>(reinterpret_cast<const float*>(rows.data) + b * rows.stride + j, to);
  } else {
    load_items<kWidth>(reinterpret_cast<const S*>(rows.data) + b * rows.stride + j, to);
  }
}

template <int kWidth, class S, class Pointer>
DLK_DEVICE void store_state(const StateRows<Pointer>& rows, int64_t b, int64_t j, const float* from) {
  if (!rows.data) return;
  if (rows.f32) {
    store_items<kWidth>(reinterpret_cast<float*>(rows.data) + b * rows.stride + j, from);
  } else {
    store_items<kWidth>(reinterpret_cast<S*>(rows.data) + b * rows.stride + j, from);
  }
}

DLK_DEVICE int row_length(const StepRows& rows, int B, int b) {
  return sequence_length(rows.offsets, rows.lengths, rows.T, B, b);
}

DLK_DEVICE bool row_is_reset(const StepRows& rows, int t, int B, int b, int length) {
  return is_reset(rows.resets, rows.offsets, B, rows.reverse, t, b, length);
}

template <class S>
__global__ void __launch_bounds__(kCellThreads) initial_resets(const __grid_constant__ InitialResets p) {
  const int j = static_cast<int>(blockIdx.y) * kUnitThreads + static_cast<int>(threadIdx.x) % kUnitThreads;
  const int b = static_cast<int>(blockIdx.x) * kRowThreads + static_cast<int>(threadIdx.x) / kUnitThreads;
  if (j >= p.H || b >= p.B || !row_is_reset(p.rows, p.rows.t, p.B, b, row_length(p.rows, p.B, b))) return;
  const int64_t at = static_cast<int64_t>(b) * p.H + j;
  static_cast<S*>(p.h)[at] = from_float<S>(0.0f);
  if (p.state) p.state[at] = 0.0f;
}

template <class Cell, class S, int kWidth>
__global__ void __launch_bounds__(kCellThreads) cell_forward(const __grid_constant__ CellForward p) {
  constexpr int kGates = Cell::kGates;
  const int j = (static_cast<int>(blockIdx.y) * kUnitThreads + static_cast<int>(threadIdx.x) % kUnitThreads) * kWidth;
  const int b = static_cast<int>(blockIdx.x) * kRowThreads + static_cast<int>(threadIdx.x) / kUnitThreads;
  if (j >= p.H || b >= p.B) return;

  const int length = row_length(p.rows, p.B, b);
  if (p.rows.t >= length) {
    if (p.rows.offsets) return;
    const float zeros[kWidth] = {};
    store_state<kWidth, S>(p.y, b, j, zeros);
    if constexpr (Cell::kCellState) store_state<kWidth, S>(p.cells, b, j, zeros);
    return;
  }
  float x[kGates][kWidth], hidden[kGates][kWidth], state[kWidth];
  DLK_UNROLL
  for (int g = 0; g < kGates; ++g) {
    const int64_t at = static_cast<int64_t>(g) * p.H + j;
    float b_ih[kWidth] = {}, b_hh[kWidth] = {};
    load_items<kWidth>(p.gates_x.data + b * p.gates_x.stride + at, x[g]);
    load_items<kWidth>(p.gates_h.data + b * p.gates_h.stride + at, hidden[g]);
    if (p.b_ih) load_items<kWidth>(static_cast<const S*>(p.b_ih) + at, b_ih);
    if (p.b_hh) load_items<kWidth>(static_cast<const S*>(p.b_hh) + at, b_hh);
    DLK_UNROLL
    for (int i = 0; i < kWidth; ++i) x[g][i] += b_ih[i], hidden[g][i] += b_hh[i];
  }
  load_state<kWidth, S>(p.state, b, j, state);

  float h[kWidth], out[Cell::kSaved][kWidth];
  DLK_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    float xs[kGates], hs[kGates], saved[Cell::kSaved];
    DLK_UNROLL
    for (int g = 0; g < kGates; ++g) xs[g] = x[g][i], hs[g] = hidden[g][i];
    h[i] = step_forward<Cell, S>(p.cell == CellKind::rnn_relu, xs, hs, state[i], saved);
    DLK_UNROLL
    for (int s = 0; s < Cell::kSaved; ++s) out[s][i] = saved[s];
  }

  // What the next step takes.
  const int next = p.rows.reverse ? p.rows.t - 1 : p.rows.t + 1;
  const bool ends = next >= 0 && row_is_reset(p.rows, next, p.B, b, length);
  float next_h[kWidth], next_state[kWidth];
  DLK_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    next_h[i] = ends ? 0.0f : h[i];
    next_state[i] = ends ? 0.0f : out[Cell::kStateSlot][i];
  }
  store_state<kWidth, S>(p.h, b, j, next_h);
  store_state<kWidth, S>(p.y, b, j, h);
  store_state<kWidth, S>(p.new_state, b, j, next_state);
  if constexpr (Cell::kCellState) {
    store_state<kWidth, S>(p.c_n, b, j, out[Cell::kStateSlot]);
    store_state<kWidth, S>(p.cells, b, j, out[Cell::kStateSlot]);
  }
  DLK_UNROLL
  for (int s = 0; s < Cell::kSaved; ++s) store_state<kWidth, S>(p.saved, b, static_cast<int64_t>(s) * p.H + j, out[s]);
}

template <class Cell, class S, int kWidth>
__global__ void __launch_bounds__(kCellThreads) cell_backward(const __grid_constant__ CellBackward p) {
  constexpr int kGates = Cell::kGates, kSlots = Cell::kGateGrads;
  const int lane = static_cast<int>(threadIdx.x) % kUnitThreads, row = static_cast<int>(threadIdx.x) / kUnitThreads;
  const int j = (static_cast<int>(blockIdx.y) * kUnitThreads + lane) * kWidth;
  const int first = static_cast<int>(blockIdx.x) * kSegmentRows;
  const int end = first + kSegmentRows < p.B ? first + kSegmentRows : p.B;
  float sums[kSlots][kWidth] = {};

  for (int b = first + row; b < end && j < p.H; b += kRowThreads) {
    const int length = row_length(p.rows, p.B, b);
    const bool live = p.rows.t < length;
    float carry[kWidth], product[kWidth], grads[kSlots][kWidth] = {};
    load_state<kWidth, S>(p.carry, b, j, carry);
    load_state<kWidth, S>(p.product, b, j, product);
    bool cut = false;
    DLK_UNROLL
    for (int i = 0; i < kWidth; ++i) carry[i] += product[i];
    if (live) {
      float saved[Cell::kSaved][kWidth], state[kWidth] = {}, dy[kWidth], dc[kWidth], dcells[kWidth];
      DLK_UNROLL
      for (int s = 0; s < Cell::kSaved; ++s) {
        load_state<kWidth, S>(p.saved, b, static_cast<int64_t>(s) * p.H + j, saved[s]);
      }
      const int own_step = p.rows.reverse ? length - 1 - p.rows.t : p.rows.t;
      const bool reset = row_is_reset(p.rows, p.rows.t, p.B, b, length);
      if (!reset) load_state<kWidth, S>(own_step == 0 ? p.first : p.state, b, j, state);
      load_state<kWidth, S>(p.dy, b, j, dy);
      load_state<kWidth, S>(p.dc, b, j, dc);
      load_state<kWidth, S>(p.dcells, b, j, dcells);
      cut = reset || (p.bptt_steps > 0 && own_step > 0 && own_step % p.bptt_steps == 0);
      DLK_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        dc[i] += dcells[i];
        float one[Cell::kSaved], dgates[kSlots];
        DLK_UNROLL
        for (int s = 0; s < Cell::kSaved; ++s) one[s] = saved[s][i];
        const float dh = carry[i] + dy[i];
        const float direct =
            step_backward(p.cell == CellKind::rnn_relu, backward_inputs<Cell, S>(one, state[i]), dh, &dc[i], dgates);
        carry[i] = cut ? 0.0f : direct;
        if (cut) dc[i] = 0.0f;
        DLK_UNROLL
        for (int k = 0; k < kSlots; ++k) grads[k][i] = dgates[k];
      }
      if constexpr (Cell::kCellState) store_state<kWidth, S>(p.new_dc, b, j, dc);
    }
    store_state<kWidth, S>(p.carry, b, j, carry);
    DLK_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const float zeros[kWidth] = {};
      store_state<kWidth, S>(p.hidden, b, static_cast<int64_t>(g) * p.H + j, cut ? zeros : grads[hidden_slot<Cell>(g)]);
    }
    if (p.rows.offsets && !live) continue;
    DLK_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const int64_t at = static_cast<int64_t>(k) * p.H + j;
      store_state<kWidth, S>(p.dgates, b, at, grads[k]);
      store_state<kWidth, S>(p.gate_grads, b, at, grads[k]);
      DLK_UNROLL
      for (int i = 0; i < kWidth; ++i) sums[k][i] += grads[k][i];
    }
  }

  if (!p.bias_sums) return;
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [row][slot][lane][width]
  DLK_UNROLL
  for (int k = 0; k < kSlots; ++k) {
    DLK_UNROLL
    for (int i = 0; i < kWidth; ++i) shared[((row * kSlots + k) * kUnitThreads + lane) * kWidth + i] = sums[k][i];
  }
  __syncthreads();
  constexpr int kWide = kUnitThreads * kWidth;
  const int first_unit = static_cast<int>(blockIdx.y) * kWide;
  float* to = p.bias_sums + static_cast<int64_t>(blockIdx.x) * p.segment_stride;
  for (int at = static_cast<int>(threadIdx.x); at < kSlots * kWide; at += kCellThreads) {
    const int k = at / kWide, unit = first_unit + at % kWide;
    if (unit >= p.H) continue;
    float* sum = to + static_cast<int64_t>(k) * p.H + unit;
    float total = p.add_to_bias_sums ? *sum : 0.0f;
    DLK_UNROLL
    for (int r = 0; r < kRowThreads; ++r) total += shared[r * kSlots * kWide + at];
    *sum = total;
  }
}

template <class Cell, class S>
__global__ void __launch_bounds__(kCellThreads) add_bias_sums(const __grid_constant__ BiasSums p) {
  const int i = static_cast<int>(blockIdx.x) * kCellThreads + static_cast<int>(threadIdx.x);
  if (i >= Cell::kGates * p.H) return;
  const int g = i / p.H, unit = i % p.H;
  const float* input = p.sums + static_cast<int64_t>(g) * p.H + unit;
  const float* hidden = p.sums + static_cast<int64_t>(hidden_slot<Cell>(g)) * p.H + unit;
  float d_ih = 0.0f, d_hh = 0.0f;
  for (int s = 0; s < p.segments; ++s) d_ih += input[s * p.stride], d_hh += hidden[s * p.stride];
  static_cast<S*>(p.b_ih)[i] = from_float<S>(d_ih);
  static_cast<S*>(p.b_hh)[i] = from_float<S>(d_hh);
}

}  // namespace gpu
}  // namespace dlk
