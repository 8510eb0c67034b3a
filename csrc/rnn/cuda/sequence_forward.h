// The recurrence of a layer over whole sequences, forward, in one kernel:
//   for each step: gates = W_ih x + W_hh h + biases;  h, c, y = cell(gates)
// W_hh stays in the blocks of a group (product.h), which exchange h once per step (group.h).
//
// What is on the way from the arrival of h to the sending of the next is what a step costs: everything that does not
// depend on h is loaded before, the input products of a chunk while the chunk before it is processed.
//
// Grid: x = slice of the units, y = tile of the sequences, z = direction. In the second direction time runs from the
// end, and a sequence begins at its own last step; until then its h is h_0. c, and h for the gru, stay in shared memory
// in float32, each element accessed by one thread only. Saved for the backward: what the cell saves (csrc/rnn/cells),
// in float32; the last slot is the state after the step.
//
// If a sequence's next step is reset, zeros are sent and kept in place of its h and its state. Its results and records
// are the true ones.
#pragma once

#include "group.h"
#include "product.h"
#include "walk.h"

namespace dlk {
namespace gpu {

template <class Cell, class S, bool kCluster, int kUnits, int kColumns>
__global__ void __launch_bounds__(kSequenceThreads, 1) sequence_forward(const __grid_constant__ SequenceForward p) {
  if constexpr (kCluster && !DLK_HAS_CLUSTERS) return;  // never launched on a GPU without clusters
  constexpr int kGates = Cell::kGates;
  constexpr SliceShape kShape = slice_shape(kGates, sizeof(S) == 2, kUnits, false);
  using Turns = CellTurns<kUnits, kColumns>;
  constexpr int kTurns = Turns::kCount;
  constexpr int kPart = kColumns * (kShape.rows + 4);  // floats of one part of a product

  char* shared = dynamic_shared();
  float* partials = reinterpret_cast<float*>(shared + p.layout.partials);
  float* states = reinterpret_cast<float*>(shared + p.layout.states);
  float* bias = reinterpret_cast<float*>(shared + p.layout.bias);
  int* lengths = reinterpret_cast<int*>(shared + p.layout.lengths);
  S* vectors = reinterpret_cast<S*>(shared + p.layout.exchange);
  const SharedLayout& layout = p.layout;
  forbid_gaps(layout, shared);

  const int thread = static_cast<int>(threadIdx.x);
  const int first_unit = static_cast<int>(blockIdx.x) * kUnits, first = static_cast<int>(blockIdx.y) * p.tile;
  const int d = static_cast<int>(blockIdx.z);
  const int unit = thread % kUnits, j = first_unit + unit;  // a thread has the same unit in all its iterations
  const bool exists = thread < Turns::kThreads && j < p.H;
  const bool relu = p.cell == CellKind::rnn_relu;
  const int64_t state0 = static_cast<int64_t>(d) * p.B + first;  // row of the tile's first sequence in h_0, c_0, ...
  const int steps = read_lengths<kColumns>(p, first, lengths);

  const S* w = static_cast<const S*>(p.w_hh[d]);
  typename ChooseProduct<S, kGates, kCluster, false, kUnits, kColumns>::type product(layout, shared);
  // The index is 32 bits wide, which is enough for every W_hh that fits the chip and halves the code of load().
  product.load([&](int row, int term) {
    const int u = first_unit + row % kUnits;
    return u < p.H && term < p.H ? to_float(w[(row / kUnits * p.H + u) * p.H + term]) : 0.0f;
  });
  // Both biases are added on the input side, except the hidden bias of the gru's n, which is added to the recurrent
  // product.
  for (int i = thread; i < (kGates + 1) * kUnits; i += kSequenceThreads) {
    const int g = i / kUnits, u = first_unit + i % kUnits;
    const bool apart = Cell::kHasPartedGate && (g == Cell::kPartedGate || g == kGates);
    const int64_t at = static_cast<int64_t>(g < kGates ? g : Cell::kHasPartedGate ? Cell::kPartedGate : 0) * p.H + u;
    float sum = 0.0f;
    if (u < p.H && g < kGates) sum += load_or_zero<S>(p.b_ih[d], at);
    if (u < p.H && (g < kGates ? !apart : apart)) sum += load_or_zero<S>(p.b_hh[d], at);
    bias[i] = sum;
  }
  // Only the first direction can begin with a reset: the flag of a sequence's last step in time would lie behind it.
  const auto drops_initial = [&](int b) {
    return d == 0 && is_reset(p.resets, p.offsets, p.B, 0, 0, first + b, lengths[b]);
  };
  for (int i = thread; thread < Turns::kThreads && i < p.tile * kUnits; i += Turns::kThreads) {
    const int b = i / kUnits;
    const int64_t at = (state0 + b) * p.H + j;
    const bool there = exists && first + b < p.B, dropped = drops_initial(b);
    const float h = there ? load_or_zero<S>(p.h0, at) : 0.0f;
    states[i] = dropped ? 0.0f : Cell::kCellState ? (there ? load_or_zero<S>(p.c0, at) : 0.0f) : h;
    if (there && lengths[b] == 0) {
      static_cast<S*>(p.h_n)[at] = from_float<S>(h);
      if constexpr (Cell::kCellState) static_cast<S*>(p.c_n)[at] = from_float<S>(states[i]);
    }
  }

  // Whether a sequence of the chunk is alive at time t. Only then is the chunk's h needed.
  const auto reads = [&](int t, int chunk) { return t < lengths[p.tile + chunk / kColumns]; };
  const int first_t = d == 0 ? 0 : steps - 1;
  auto group = make_group<S, kCluster>(p, shared, kUnits);
  group.begin(
      [&](int b, int term) {
        const bool there = term < p.H && first + b < p.B && !drops_initial(b);
        return from_float<S>(there ? load_or_zero<S>(p.h0, (state0 + b) * p.H + term) : 0.0f);
      },
      [&](int b) { return reads(first_t, b); });

  const RowTensor<const float*>& gates = p.gates[d];
  S* y = static_cast<S*>(p.y.data) + d * p.H + j;
  float* saved = p.saved ? p.saved + d * p.saved_rows * Cell::kSaved * p.H + j : nullptr;
  int turn_parity = 0;

  // What a thread's cells of a chunk need beside the products of h.
  struct Inputs {
    float x[kTurns][kGates];
    bool live[kTurns];
    unsigned resets;  // bit i: the sequence of cell i takes its next step with zeros; the bits share a register
  };
  const auto fetch = [&](int t, int chunk, Inputs* in) {
    const int next_t = d == 0 ? t + 1 : t - 1;
    in->resets = 0;
    DLK_UNROLL
    for (int i = 0; i < kTurns; ++i) {
      const int b = chunk + Turns::column(thread, i);
      in->live[i] = Turns::has_cell(thread, i) && t < lengths[b];
      const bool reset = in->live[i] && is_reset(p.resets, p.offsets, p.B, d, next_t, first + b, lengths[b]);
      in->resets |= static_cast<unsigned>(reset) << i;
      const bool given = exists && in->live[i];
      const float* from = given ? gates.data + row_offset(gates, p.offsets, t, first + b) + j : nullptr;
      DLK_UNROLL
      for (int g = 0; g < kGates; ++g) in->x[i][g] = given ? from[static_cast<int64_t>(g) * p.H] : 0.0f;
    }
  };
  Inputs next;
  if (steps > 0) fetch(first_t, 0, &next);

  for (int s = 0; s < steps; ++s) {
    const int t = d == 0 ? s : steps - 1 - s, next_t = d == 0 ? t + 1 : t - 1;
    const bool more = s + 1 < steps;
    group.prepare(s, [&] {
      int count = 0;
      for (int chunk = 0; more && chunk < p.tile; chunk += kColumns) count += reads(next_t, chunk) ? kColumns : 0;
      return count;
    });
    for (int chunk = 0; chunk < p.tile; chunk += kColumns) {
      const bool last_chunk = chunk + kColumns >= p.tile;
      Inputs now = next;
      // A sequence that is not alive sends its h_0, since in the second direction it may begin at the next step.
      float state[kTurns], idle[kTurns];
      DLK_UNROLL
      for (int i = 0; i < kTurns; ++i) {
        DLK_UNROLL
        for (int g = 0; g < kGates; ++g) now.x[i][g] += bias[g * kUnits + unit];
        const int b = chunk + Turns::column(thread, i);
        const bool busy = Turns::has_cell(thread, i), waits = busy && exists && !now.live[i] && first + b < p.B;
        state[i] = busy ? states[b * kUnits + unit] : 0.0f;
        idle[i] = waits ? load_or_zero<S>(p.h0, (state0 + b) * p.H + j) : 0.0f;
      }
      if (!last_chunk || more) fetch(last_chunk ? next_t : t, last_chunk ? 0 : chunk + kColumns, &next);
      const float apart = Cell::kHasPartedGate ? bias[kGates * kUnits + unit] : 0.0f;
      const bool any_live = reads(t, chunk), sends = more && reads(next_t, chunk);
      if (chunk == 0) group.wait(s);

      // Two sets of partial sums alternate, so that no thread overwrites those that others are still adding up.
      float* part = partials + turn_parity * kShape.splits * kPart;
      if (any_live) {
        const S* from = group.vectors(s) + chunk * layout.stride;
        product.multiply(near_vectors<kCluster, kColumns>(from, vectors, layout), part);
        __syncthreads();
        turn_parity ^= 1;
      }

      float h_new[kTurns] = {}, out[kTurns][Cell::kSaved] = {};
      DLK_UNROLL
      for (int i = 0; i < kTurns; ++i) {
        const int column = Turns::column(thread, i), b = chunk + column;
        if (!Turns::warp_has_cells(thread, i)) break;
        const bool busy = Turns::kWholeWarps || Turns::has_cell(thread, i);
        if (any_live && busy) {
          float hidden[kGates];
          DLK_UNROLL
          for (int g = 0; g < kGates; ++g) {
            hidden[g] = add_parts<kShape.splits>(part + column * (kShape.rows + 4) + g * kUnits + unit, kPart);
          }
          if constexpr (Cell::kHasPartedGate) hidden[Cell::kPartedGate] += apart;
          h_new[i] = step_forward<Cell, S>(relu, now.x[i], hidden, state[i], out[i]);
        }
        // Lanes without a cell take part, because send() exchanges items between lanes.
        const bool passes = exists && !(now.resets >> i & 1);
        const float item = !now.live[i] ? idle[i] : passes ? h_new[i] : 0.0f;
        if (sends) group.send(s, b, j, {item}, busy);
      }

      DLK_UNROLL
      for (int i = 0; i < kTurns; ++i) {
        const int b = chunk + Turns::column(thread, i);
        if (!Turns::has_cell(thread, i)) break;
        if (any_live) group.template retire<1>(s, b, j);
        if (now.live[i]) states[b * kUnits + unit] = now.resets >> i & 1 ? 0.0f : out[i][Cell::kStateSlot];
        if (!exists || first + b >= p.B) continue;
        if (now.live[i] || !p.offsets) {
          const int64_t row = row_offset(p.y, p.offsets, t, first + b);
          y[row] = from_float<S>(now.live[i] ? h_new[i] : 0.0f);
          if constexpr (Cell::kCellState) {
            const float c = now.live[i] ? out[i][Cell::kStateSlot] : 0.0f;
            if (p.cells) static_cast<S*>(p.cells)[row + d * p.H + j] = from_float<S>(c);
          }
        }
        if (!now.live[i]) continue;
        if (saved) {
          float* to = saved + row_number(p.offsets, p.B, t, first + b) * Cell::kSaved * p.H;
          DLK_UNROLL
          for (int k = 0; k < Cell::kSaved; ++k) to[static_cast<int64_t>(k) * p.H] = out[i][k];
        }
        if (t == (d == 0 ? lengths[b] - 1 : 0)) {
          const int64_t at = (state0 + b) * p.H + j;
          static_cast<S*>(p.h_n)[at] = from_float<S>(h_new[i]);
          if constexpr (Cell::kCellState) static_cast<S*>(p.c_n)[at] = from_float<S>(out[i][Cell::kStateSlot]);
        }
      }
    }
    group.finish(s);
  }

  if (p.offsets || !exists) return;
  for (int t = steps; t < p.T; ++t) {
    for (int b = thread / kUnits; b < p.tile && first + b < p.B; b += Turns::kApart) {
      const int64_t row = row_offset(p.y, nullptr, t, first + b);
      y[row] = from_float<S>(0.0f);
      if (p.cells) static_cast<S*>(p.cells)[row + d * p.H + j] = from_float<S>(0.0f);
    }
  }
}

}  // namespace gpu
}  // namespace dlk
