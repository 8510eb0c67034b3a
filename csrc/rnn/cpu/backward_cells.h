// The cell's backward for the units of one row (see backward_walk.h).
#pragma once

#include "rnn/cpu/backward_walk.h"

DLK_ISA_BEGIN

// The addresses of the row's values are computed once for all of its units: once per vector took longer than the
// arithmetic.
template <class C, class Cell>
struct Backward<C, Cell>::Walk::CellRow {
  const Walk& walk;
  const Backward& backward;
  const int64_t i, row;  // index among the thread's sequences, row of the chunk
  const Row& at;
  const bool is_joining, is_cut;
  const C *saved, *past;  // the records of this step and of the one before it in time; no `past` at the first step
  const void *dy, *dcells;
  C *carry, *gates;
  Operand<C>* rounded;

  DLK_INLINE CellRow(const Walk& walk, int64_t i, int64_t row, int64_t parity)
      : walk(walk),
        backward(walk.backward),
        i(i),
        row(row),
        at(walk.dir.rows[row]),
        is_joining(walk.is_joining(i)),
        is_cut(!is_joining && walk.cut(i, at.t)),
        saved(backward.saved_record(walk.d, at.t, at.b)),
        past(at.first ? nullptr : backward.saved_record(walk.d, backward.past(walk.d, at.t), at.b)),
        dy(gradient(backward.p_.dy, backward.O_)),
        dcells(gradient(backward.p_.dcells, backward.s_.H)),
        carry(walk.carry(i)),
        gates(backward.keeps_gates() ? backward.gates(walk.d, parity) + row * backward.ld_gates_ : nullptr),
        rounded(kPairs ? backward.rounded(walk.d, parity) + row * backward.ld_operand_ : nullptr) {}

  // The row of this direction's features in the gradient of an output of every step.
  DLK_INLINE const void* gradient(const RowTensor<const void*>& of, int64_t features) const {
    if (!of.data) return nullptr;
    return advance(of.data, of.dtype, backward.layout_.at(of, at.t, at.b) + walk.d * features);
  }

  // The part of dh that does not come through W_hh: dy, and dh_n or the gru's direct path from the next step.
  DLK_INLINE V incoming(int64_t j, int n) const {
    V sum = V::zero();
    if (dy) sum = load_any<C>(backward.p_.dy.dtype, dy, j, n);
    if (is_joining) {
      if (backward.p_.dh_n) sum = sum + load_state<C>(backward.p_.dh_n, walk.state(i, backward.O_) + j, n);
    } else if constexpr (Cell::kDirectPath) {
      if (!is_cut) sum = sum + V::load(carry + j);
    }
    return sum;
  }

  // The cell's backward for n units from j on; dh is the complete gradient of the cell's output.
  DLK_INLINE void cell(int64_t j, int n, V dh) const {
    const int64_t H = backward.s_.H;
    V slots[Cell::kSaved], dgates[kSlots];
    const bool keeps_state = backward.record_.keeps_state;
    for (int k = 0; k < Cell::kSaved; ++k)
      slots[k] = k < Cell::kStateSlot || keeps_state ? backward.record_.load(saved, k, j, n) : V::zero();
    if constexpr (Cell::kCellState) {
      V dc = V::zero();
      const V previous = at.reset ? V::zero()
                         : past   ? backward.record_.load(past, Cell::kStateSlot, j, n)
                                  : load_state<C>(backward.p_.c0, walk.state(i, H) + j, n);
      if (is_joining) {
        dc = load_state<C>(backward.p_.dc_n, walk.state(i, H) + j, n);
      } else if (!is_cut) {
        dc = V::load(carry + j);
      }
      if (dcells) dc = dc + load_any<C>(backward.p_.dcells.dtype, dcells, j, n);
      if (!keeps_state) slots[Cell::kStateSlot] = Cell::state(slots, previous);
      V factors[Cell::kFactors];
      const V out = Cell::factors(slots, previous, factors);
      Cell::backward(factors, dh, &dc, dgates);
      dc.store(carry + j);
      if (backward.s_.P) out.store(walk.dir.cell_out + row * backward.ld_unit_ + j);
    } else if constexpr (Cell::kDirectPath) {
      Cell::backward(slots, backward.past_h(walk.d, at, j, n), dh, dgates).store(carry + j);
    } else {
      dgates[0] = Cell::backward(slots[0], dh);
    }
    if (gates)
      for (int k = 0; k < kSlots; ++k) store_part(gates + k * H + j, dgates[k], n);
    if constexpr (kPairs)
      for (int k = 0; k < kSlots; ++k) store_operands<C>(rounded + k * backward.slot_ + j, dgates[k], n);
  }
};

DLK_ISA_END
