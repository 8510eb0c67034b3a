// The steps of the forward of one direction, for the sequences of one thread or those that a team shares (forward.h).
#pragma once

#include "rnn/cells/gru.h"
#include "rnn/cells/lstm.h"
#include "rnn/cpu/variants/forward.h"

DLK_ISA_BEGIN

template <class C, class Cell>
struct VariantForward<C, Cell>::Walk {
  const VariantForward& forward;
  const Direction& dir;
  Member member;
  SequenceSubset subset;
  Own& own;
  int d;
  int64_t slot;  // the thread's first row in the buffers of a step

  const ForwardParams& p() const { return forward.p_; }
  const LayerShape& s() const { return forward.s_; }
  int64_t time(int64_t nth) const { return d == 0 ? nth : forward.layout_.steps() - 1 - nth; }
  C* h(int64_t i) const { return dir.h + (slot + i) * forward.ld_unit_; }
  Operand<C>* operands(int64_t i) const { return dir.operands + (slot + i) * forward.ld_operand_; }
  C* c(int64_t i) const { return dir.c + (slot + i) * forward.ld_unit_; }
  C* input(int64_t row) const { return dir.input + (slot * forward.chunk_ + row) * forward.ld_gates_; }
  C* hidden(int64_t i) const { return dir.hidden + (slot + i) * forward.ld_gates_; }
  // Offset of sequence i in a [D, B, H] tensor.
  int64_t state(int64_t i) const { return (d * s().B + subset.sequence(i)) * s().H; }

  void go() {
    begin_states();
    member.sync();
    const int64_t steps = forward.layout_.steps();
    for (int64_t nth = 0; nth < steps; nth += forward.chunk_) {
      const int64_t count = std::min(forward.chunk_, steps - nth);
      number_rows(nth, count);
      project(own.first[count]);
      member.sync();
      for (int64_t k = 0; k < count; ++k) step(time(nth + k), own.first[k], own.first[k + 1] - own.first[k]);
    }
  }

  void begin_states() const {
    int64_t begin, end;
    member.share(subset.count, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const bool empty = subset.length(i) == 0;
      // Pairs are read up to the end of the last one.
      if (kPairs) std::fill_n(operands(i) + s().H, forward.ld_operand_ - s().H, Operand<C>{});
      each_vector_of<C>(s().H, [&](int64_t j, int n) __attribute__((always_inline)) {
        const V value = load_state<C>(p().h0, state(i) + j, n);
        put_h(i, j, n, value);
        if (empty) store_state<C>(p().h_n, state(i) + j, value, n);
        if constexpr (Cell::kCellState) {
          const V of_c = load_state<C>(p().c0, state(i) + j, n);
          of_c.store(c(i) + j);
          if (empty) store_state<C>(p().c_n, state(i) + j, of_c, n);
        }
      });
    }
  }

  DLK_INLINE void put_h(int64_t i, int64_t j, int n, V value) const {
    value.store(h(i) + j);
    if (!forward.keeps_operands()) return;
    if (forward.v_.dropout) value = value * load_part(static_cast<const C*>(forward.v_.dropout) + state(i) + j, n);
    store_operands<C>(operands(i) + j, value, n);
  }

  void number_rows(int64_t nth, int64_t count) const {
    int64_t row = 0, alive = subset.count;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t t = time(nth + k);
      alive = subset.alive(t, alive);
      own.first[k] = row;
      for (int64_t i = 0; i < alive; ++i, ++row)
        own.x[row] = advance(p().x.data, p().x.dtype, forward.layout_.at(p().x, t, subset.sequence(i)));
    }
    own.first[count] = row;
  }

  // Products of rows [m0, m1) of `a` with panels [p0, p1), to rows of ld_gates_ values from `to` on.
  template <class Rows>
  DLK_INLINE void multiply(int64_t m0, int64_t m1, int64_t p0, int64_t p1, const Rows& a, const Panels<C>& panels,
                           C* to) const {
    const int64_t ld = forward.ld_gates_;
    gemm(
        m0, m1, p0, p1, a, panels, [&](int64_t m, GemmColumn at) -> const void* { return to + m * ld + at.column; },
        [&](int64_t m, GemmColumn at, V value, int n) { store_part(to + m * ld + at.column, value, n); }, to, ld);
  }

  // The products of x with W_ih of the first `rows` rows of the chunk.
  void project(int64_t rows) const {
    const DirectionWeights& w = p().weights[d];
    const GemmShare share(member, rows, forward.ih_, forward.fresh_);
    const Panels<C> panels = forward.panels(forward.ih_, dir.ih, w.dtype, w.w_ih, own.panel);
    const auto x_row = [&](int64_t row) { return own.x[row]; };
    if (forward.copies_x()) {
      const CopiedRows<C, decltype(x_row)> a{x_row, p().x.dtype, s().I, block_ld<C>(forward.ih_.K), own.block};
      multiply(share.m0, share.m1, share.p0, share.p1, a, panels, input(0));
    } else {
      multiply(share.m0, share.m1, share.p0, share.p1, DirectRows<C, decltype(x_row)>{x_row}, panels, input(0));
    }
  }

  void step(int64_t t, int64_t first, int64_t alive) const {
    const DirectionWeights& w = p().weights[d];
    int64_t p0, p1;
    member.share(forward.hh_.count(), 1, &p0, &p1);
    const auto row_of = [&](int64_t i) -> const void* {
      return forward.keeps_operands() ? static_cast<const void*>(operands(i)) : h(i);
    };
    multiply(0, alive, p0, p1, DirectRows<C, decltype(row_of)>{row_of},
             forward.panels(forward.hh_, dir.hh, w.dtype, w.w_hh, own.panel), hidden(0));
    member.sync();
    int64_t begin, end;
    member.share(alive, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) row(t, input(first + i), i);
    member.sync();
  }

  // Normalises the products of one row, adds the biases, and applies the cell.
  void row(int64_t t, C* x, int64_t i) const {
    const int64_t H = s().H, b = subset.sequence(i), at = d * s().rows + forward.layout_.row(t, b);
    C* const saved = p().saved ? static_cast<C*>(p().saved) + at * forward.record_.size : nullptr;
    C* const of_h = hidden(i);
    const VariantConstants<C>& constants = dir.constants;
    const C eps = static_cast<C>(forward.v_.eps);
    if (forward.v_.normalised) {
      const VariantRecord<Cell>& record = forward.record_;
      each_normalised_part<Cell>(H, [&](int part, int64_t from, int64_t size) {
        const C input_scale = normalise(x + from, size, constants.g_ih + from, constants.b_ih + from, eps,
                                        saved ? saved + record.input() + from : nullptr);
        const C hidden_scale = normalise(of_h + from, size, constants.g_hh + from, constants.b_hh + from, eps,
                                         saved ? saved + record.hidden() + from : nullptr);
        if (!saved) return;
        saved[record.moments() + kOfInput + part] = input_scale;
        saved[record.moments() + kOfHidden + part] = hidden_scale;
      });
    }
    const auto zoneout = [&](const uint8_t* mask, double rate) {
      return Zoneout<C>{mask ? mask + at * H : nullptr, static_cast<C>(rate)};
    };
    const Zoneout<C> zone_h = zoneout(forward.v_.mask_h, forward.v_.zoneout_h);
    const bool last = d == 1 ? t == 0 : t == subset.length(i) - 1;
    const int64_t y = forward.layout_.at(p().y, t, b) + d * H;
    const auto emit = [&](int64_t j, int n, V value) __attribute__((always_inline)) {
      const V out = zone_h.apply(j, n, V::load(h(i) + j), value);
      put_h(i, j, n, out);
      store_any<C>(p().y.dtype, p().y.data, y + j, out, n);
      if (saved) store_part(saved + forward.record_.slot(VariantRecord<Cell>::kH) + j, out, n);
      if (last) store_state<C>(p().h_n, state(i) + j, out, n);
    };
    const auto gates = [&](int64_t j, V* of_input, V* of_hidden) __attribute__((always_inline)) {
      DLK_UNROLL
      for (int g = 0; g < Cell::kGates; ++g) {
        const int64_t k = g * H + j;
        of_input[g] = V::load(x + k);
        of_hidden[g] = V::load(of_h + k);
        if (forward.v_.normalised) continue;
        of_input[g] = of_input[g] + V::load(constants.b_ih + k);
        of_hidden[g] = of_hidden[g] + V::load(constants.b_hh + k);
      }
    };
    if constexpr (Cell::kCellState) {
      const Zoneout<C> zone_c = zoneout(forward.v_.mask_c, forward.v_.zoneout_c);
      each_vector_of<C>(H, [&](int64_t j, int n) __attribute__((always_inline)) {
        V of_input[Cell::kGates], of_hidden[Cell::kGates], slots[Cell::kSaved];
        gates(j, of_input, of_hidden);
        const V before = V::load(c(i) + j);
        Cell::gates(of_input, of_hidden, before, slots);
        const V next = zone_c.apply(j, n, before, slots[Cell::kC]);
        next.store(c(i) + j);
        if (last) store_state<C>(p().c_n, state(i) + j, next, n);
        if (saved) {
          DLK_UNROLL
          for (int k = 0; k < Cell::kSaved; ++k) store_part(saved + forward.record_.slot(k) + j, slots[k], n);
          store_part(saved + forward.record_.slot(VariantRecord<Cell>::kC) + j, next, n);
        }
        if (forward.v_.normalised) {
          slots[Cell::kO].store(own.o + j);
          slots[Cell::kC].store(own.c + j);
        } else {
          emit(j, n, slots[Cell::kO] * tanh(slots[Cell::kC]));
        }
      });
      if (!forward.v_.normalised) return;
      const Moments<C> of_c = moments_of(own.c, H, eps);
      if (saved) {
        saved[forward.record_.moments() + kMeanOfC] = of_c.mean;
        saved[forward.record_.moments() + kOfC] = of_c.scale;
      }
      const V mean = V::set1(of_c.mean), scale = V::set1(of_c.scale);
      each_vector_of<C>(H, [&](int64_t j, int n) __attribute__((always_inline)) {
        const V normalised = (V::load(own.c + j) - mean) * scale;
        const V seen_c = fma(normalised, V::load(constants.g_c + j), V::load(constants.b_c + j));
        emit(j, n, V::load(own.o + j) * tanh(seen_c));
      });
    } else {
      each_vector_of<C>(H, [&](int64_t j, int n) __attribute__((always_inline)) {
        V of_input[Cell::kGates], of_hidden[Cell::kGates], slots[Cell::kSaved];
        gates(j, of_input, of_hidden);
        const V out = Cell::forward(of_input, of_hidden, V::load(h(i) + j), slots);
        if (saved) {
          DLK_UNROLL
          for (int k = 0; k < Cell::kStateSlot; ++k) store_part(saved + forward.record_.slot(k) + j, slots[k], n);
        }
        emit(j, n, out);
      });
    }
  }
};

DLK_ISA_END
