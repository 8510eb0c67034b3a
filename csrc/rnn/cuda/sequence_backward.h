// The recurrence of a layer over whole sequences, backward, in one kernel:
//   for each step, last first: dh = dy + dgates(next) W_hh + the direct path from the next step, past its gates;
//                              dgates, dc = the cell's backward of dh and dc
// The blocks and their exchange are those of the forward. Here a block has the columns of W_hh of its own units, and
// the vectors that the blocks exchange are the gate gradients of the hidden side, rounded to the layer's dtype:
// [slice][gate][unit], or [slice][unit][gate] with the four gates of the lstm, so that a thread's items are adjacent
// and only two threads have to exchange them before they are sent. dgates is also written to global memory, from which
// the caller's products compute dx and the weight gradients.
//
// The other part of dh that passes from step to step (`carry`: dh_n at first, then the gru's direct path) and dc are
// kept in shared memory in float32. At a step at which a sequence is not alive, dc stays as it is and the product with
// W_hh is added to `carry`. After the last step `carry` is thus the gradient of h_0, at whichever step a sequence ends.
// bptt_steps and resets cut gradients by passing on zeros; a reset at a sequence's first step also makes the gradients
// of h_0 and c_0 zero. Each thread sums the bias gradients of its unit, in a fixed order.
#pragma once

#include "group.h"
#include "product.h"
#include "walk.h"

namespace dlk {
namespace gpu {

template <class Cell, class S, bool kCluster, int kUnits, int kColumns>
__global__ void __launch_bounds__(kSequenceThreads, 1) sequence_backward(const __grid_constant__ SequenceBackward p) {
  if constexpr (kCluster && !DLK_HAS_CLUSTERS) return;  // never launched on a GPU without clusters
  constexpr int kGates = Cell::kGates, kSlots = Cell::kGateGrads;
  constexpr SliceShape kShape = slice_shape(kGates, sizeof(S) == 2, kUnits, true);
  using Turns = CellTurns<kUnits, kColumns>;
  constexpr int kTurns = Turns::kCount;
  constexpr int kItems = kGates == 4 ? kGates : 1;  // of a thread, adjacent in a vector
  constexpr int kPart = kColumns * (kShape.rows + 4);

  char* shared = dynamic_shared();
  const SharedLayout& layout = p.layout;
  float* partials = reinterpret_cast<float*>(shared + layout.partials);
  float* carries = reinterpret_cast<float*>(shared + layout.states);
  float* dcs = carries + p.tile * kUnits;
  int* lengths = reinterpret_cast<int*>(shared + layout.lengths);
  S* vectors = reinterpret_cast<S*>(shared + layout.exchange);
  forbid_gaps(layout, shared);

  const int thread = static_cast<int>(threadIdx.x), slice = static_cast<int>(blockIdx.x);
  const int first_unit = slice * kUnits, first = static_cast<int>(blockIdx.y) * p.tile;
  const int d = static_cast<int>(blockIdx.z);
  const int unit = thread % kUnits, j = first_unit + unit;
  const bool exists = thread < Turns::kThreads && j < p.H;
  const bool relu = p.cell == CellKind::rnn_relu;
  const int64_t state0 = static_cast<int64_t>(d) * p.B + first;
  const int steps = read_lengths<kColumns>(p, first, lengths);

  // The place of a gate's gradient of this thread's unit in a vector, with those of the next gates behind it if a
  // thread has several items.
  const auto first_term = [&](int gate) {
    return kItems > 1 ? (first_unit + unit) * kGates + gate : (slice * kGates + gate) * kUnits + unit;
  };

  const S* w = static_cast<const S*>(p.w_hh[d]);
  typename ChooseProduct<S, kGates, kCluster, true, kUnits, kColumns>::type product(layout, shared);
  // The index is 32 bits wide, which is enough for every W_hh that fits the chip and halves the code of load().
  product.load([&](int row, int term) {
    const int gate = kItems > 1 ? term % kGates : term / kUnits % kGates;
    const int from = kItems > 1 ? term / kGates : term / (kGates * kUnits) * kUnits + term % kUnits;
    const int u = first_unit + row;
    return row < kUnits && u < p.H && from < p.H ? to_float(w[(gate * p.H + from) * p.H + u]) : 0.0f;
  });
  for (int i = thread; thread < Turns::kThreads && i < p.tile * kUnits; i += Turns::kThreads) {
    const int b = i / kUnits;
    const int64_t at = (state0 + b) * p.H + j;
    const bool there = exists && first + b < p.B;
    carries[i] = there ? load_or_zero<S>(p.dh_n, at) : 0.0f;
    dcs[i] = there ? load_or_zero<S>(p.dc_n, at) : 0.0f;
  }
  // No gradient arrives for sequences that are not alive yet, nor for those that ended before the previous step.
  const auto reads = [&](int t, int chunk) {
    const int longest = lengths[p.tile + chunk / kColumns];
    return d == 0 ? t < longest : t <= longest;
  };
  const int first_t = d == 0 ? steps - 1 : 0;
  auto group = make_group<S, kCluster>(p, shared, kGates * kUnits);
  group.begin([](int, int) { return from_float<S>(0.0f); }, [&](int b) { return reads(first_t, b); });

  const int64_t rows0 = d * p.saved_rows;
  const float* saved = p.saved + rows0 * Cell::kSaved * p.H + j;
  const S* dy = p.dy.data ? static_cast<const S*>(p.dy.data) + d * p.H + j : nullptr;
  const S* dcells = p.dcells.data ? static_cast<const S*>(p.dcells.data) + d * p.H + j : nullptr;
  const RowTensor<void*>& dgates = p.dgates[d];
  float* gate_grads = p.gate_grads ? p.gate_grads + rows0 * kSlots * p.H + j : nullptr;
  float bias_sums[kSlots] = {};
  int turn_parity = 0;

  // What a thread's cells of a chunk need beside the products of the gate gradients. It is loaded while the chunk
  // before it is processed, except with wide slices, whose weights leave no registers for two chunks at a time.
  constexpr bool kFetchAhead = !is_wide(kGates, kUnits);
  struct Inputs {
    float record[kTurns][Cell::kSaved], state[kTurns], dy[kTurns], dcells[kTurns];
    bool live[kTurns], cut[kTurns];
  };
  const auto fetch = [&](int s, int t, int chunk, Inputs* in) {
    DLK_UNROLL
    for (int i = 0; i < kTurns; ++i) {
      const int b = chunk + Turns::column(thread, i);
      const int length = Turns::has_cell(thread, i) ? lengths[b] : 0;
      const bool live = exists && s < steps && t < length;
      in->live[i] = live;
      in->cut[i] = false;
      in->state[i] = in->dy[i] = in->dcells[i] = 0.0f;
      DLK_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k) in->record[i][k] = 0.0f;
      if (!live) continue;
      const int64_t row = row_number(p.offsets, p.B, t, first + b);
      DLK_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k) in->record[i][k] = saved[(row * Cell::kSaved + k) * p.H];
      if (dy) in->dy[i] = to_float(dy[row_offset(p.dy, p.offsets, t, first + b)]);
      if constexpr (Cell::kCellState) {
        if (dcells) in->dcells[i] = to_float(dcells[row_offset(p.dcells, p.offsets, t, first + b)]);
      }
      const int own_step = d == 0 ? t : length - 1 - t;
      const bool reset = is_reset(p.resets, p.offsets, p.B, d, t, first + b, length);
      in->cut[i] = reset || (p.bptt_steps > 0 && own_step > 0 && own_step % p.bptt_steps == 0);
      if (kIsRnn<Cell> || reset) continue;
      if (own_step == 0) {
        in->state[i] = load_or_zero<S>(Cell::kCellState ? p.c0 : p.h0, (state0 + b) * p.H + j);
      } else {
        const int64_t before = row_number(p.offsets, p.B, d == 0 ? t - 1 : t + 1, first + b);
        in->state[i] = saved[(before * Cell::kSaved + Cell::kStateSlot) * p.H];
      }
    }
  };
  Inputs next;
  if (kFetchAhead) fetch(0, first_t, 0, &next);

  // There is one iteration more than there are steps: the last one completes the gradient of h_0.
  for (int s = 0; s <= steps; ++s) {
    const int t = d == 0 ? steps - 1 - s : s, next_t = d == 0 ? t - 1 : t + 1;
    const bool more = s < steps;
    group.prepare(s, [&] {
      int count = 0;
      for (int chunk = 0; more && chunk < p.tile; chunk += kColumns) count += reads(next_t, chunk) ? kColumns : 0;
      return count;
    });
    for (int chunk = 0; chunk < p.tile; chunk += kColumns) {
      const bool last_chunk = chunk + kColumns >= p.tile;
      if (!kFetchAhead) fetch(s, t, chunk, &next);
      const Inputs now = next;
      float carry[kTurns], dc[kTurns];
      DLK_UNROLL
      for (int i = 0; i < kTurns; ++i) {
        const int at = (chunk + Turns::column(thread, i)) * kUnits + unit;
        const bool busy = Turns::has_cell(thread, i);
        carry[i] = busy ? carries[at] : 0.0f;
        dc[i] = busy && Cell::kCellState ? dcs[at] : 0.0f;
        if (Cell::kCellState && !kFetchAhead) dc[i] += now.dcells[i];  // no register keeps it until it is needed
      }
      if (kFetchAhead && !last_chunk) fetch(s, t, chunk + kColumns, &next);
      if (kFetchAhead && last_chunk && more) fetch(s + 1, next_t, 0, &next);
      // What has been loaded ahead is here already. In wide slices it is still on its way.
      BackwardInputs<Cell, S> inputs[kTurns];
      DLK_UNROLL
      for (int i = 0; kFetchAhead && i < kTurns; ++i) {
        inputs[i] = backward_inputs<Cell, S>(now.record[i], now.state[i]);
      }
      const bool any_live = reads(t, chunk), sends = more && reads(next_t, chunk);
      if (chunk == 0) group.wait(s);

      float* part = partials + turn_parity * kShape.splits * kPart;
      if (any_live) {
        const S* from = group.vectors(s) + chunk * layout.stride;
        // Otherwise the compiler computes this address before every load. With 16 columns it has no register for it.
        if constexpr (kCluster && sizeof(S) == 2 && kColumns == kMmaColumns) from = keep_shared(from);
        product.multiply(near_vectors<kCluster, kColumns>(from, vectors, layout), part);
        __syncthreads();
        turn_parity ^= 1;
      }

      float grads[kTurns][kSlots] = {};
      DLK_UNROLL
      for (int i = 0; i < kTurns; ++i) {
        const int column = Turns::column(thread, i), b = chunk + column;
        if (!Turns::warp_has_cells(thread, i)) break;
        const bool busy = Turns::kWholeWarps || Turns::has_cell(thread, i);
        if (any_live && busy) {
          carry[i] += add_parts<kShape.splits>(part + column * (kShape.rows + 4) + unit, kPart);
          if (now.live[i]) {
            if (Cell::kCellState && kFetchAhead) dc[i] += now.dcells[i];
            if constexpr (!kFetchAhead) inputs[i] = backward_inputs<Cell, S>(now.record[i], now.state[i]);
            carry[i] = step_backward(relu, inputs[i], now.dy[i] + carry[i], &dc[i], grads[i]);
            if (now.cut[i]) carry[i] = dc[i] = 0.0f;
          }
        }
        if (!sends) continue;
        // Lanes without a cell take part, because send() exchanges items between lanes.
        DLK_UNROLL
        for (int g = 0; g < kGates; g += kItems) {
          float items[kItems];
          DLK_UNROLL
          for (int k = 0; k < kItems; ++k) items[k] = now.cut[i] ? 0.0f : grads[i][hidden_slot<Cell>(g + k)];
          group.send(s, b, first_term(g), items, busy);
        }
      }

      DLK_UNROLL
      for (int i = 0; i < kTurns; ++i) {
        const int b = chunk + Turns::column(thread, i);
        if (!Turns::has_cell(thread, i)) break;
        if (any_live) {
          carries[b * kUnits + unit] = carry[i];
          if constexpr (Cell::kCellState) dcs[b * kUnits + unit] = dc[i];
          DLK_UNROLL
          for (int g = 0; g < kGates; g += kItems) group.template retire<kItems>(s, b, first_term(g));
        }
        if (!exists || !more || first + b >= p.B) continue;
        if (p.offsets && !now.live[i]) continue;
        S* to = static_cast<S*>(dgates.data) + row_offset(dgates, p.offsets, t, first + b) + j;
        const int64_t row = row_number(p.offsets, p.B, t, first + b);
        DLK_UNROLL
        for (int k = 0; k < kSlots; ++k) {
          to[static_cast<int64_t>(k) * p.H] = from_float<S>(grads[i][k]);
          if (gate_grads) gate_grads[(row * kSlots + k) * p.H] = grads[i][k];
          bias_sums[k] += grads[i][k];
        }
      }
    }
    group.finish(s);
  }

  // If a chunk has fewer cells than the block has threads, the values read here were written above by other threads.
  __syncthreads();
  for (int i = thread; exists && i < p.tile * kUnits; i += Turns::kThreads) {
    const int b = i / kUnits;
    if (first + b >= p.B) break;
    const int64_t at = (state0 + b) * p.H + j;
    store_if<S>(p.dh0, at, carries[i]);
    if constexpr (Cell::kCellState) store_if<S>(p.dc0, at, dcs[i]);
  }
  if (p.bias_sums) {
    // Adds up the sums of the threads of each unit, in a fixed order.
    __syncthreads();
    DLK_UNROLL
    for (int k = 0; k < kSlots; ++k) partials[k * kSequenceThreads + thread] = bias_sums[k];
    __syncthreads();
    float* to = p.bias_sums + (static_cast<int64_t>(blockIdx.y) * p.D + d) * kSlots * p.H;
    for (int i = thread; i < kSlots * kUnits; i += kSequenceThreads) {
      const int k = i / kUnits, u = i % kUnits;
      float sum = 0.0f;
      for (int of = u; of < kSequenceThreads; of += kUnits) sum += partials[k * kSequenceThreads + of];
      if (first_unit + u < p.H) to[static_cast<int64_t>(k) * p.H + first_unit + u] = sum;
    }
  }
  if (p.offsets || !exists) return;
  for (int t = steps; t < p.T; ++t) {
    for (int b = thread / kUnits; b < p.tile && first + b < p.B; b += Turns::kApart) {
      S* to = static_cast<S*>(dgates.data) + row_offset(dgates, nullptr, t, first + b) + j;
      const int64_t row = row_number(nullptr, p.B, t, first + b);
      DLK_UNROLL
      for (int k = 0; k < kSlots; ++k) {
        to[static_cast<int64_t>(k) * p.H] = from_float<S>(0.0f);
        if (gate_grads) gate_grads[(row * kSlots + k) * p.H] = 0.0f;
      }
    }
  }
}

}  // namespace gpu
}  // namespace dlk
