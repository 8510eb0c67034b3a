// The steps of the backward of one direction, for the sequences of one thread or those that a team shares (backward.h).
// `nth` is a step's number in the order of the backward; "next" is meant in the order of the forward: the step that the
// backward processed just before.
#pragma once

#include "rnn/cells/gru.h"
#include "rnn/cells/lstm.h"
#include "rnn/cpu/variants/backward.h"

DLK_ISA_BEGIN

template <class C, class Cell>
struct VariantBackward<C, Cell>::Walk {
  const VariantBackward& backward;
  const Direction& dir;
  Member member;
  SequenceSubset subset;
  C* panel_buffer;
  int d, worker;
  const Operand<C>* next =
      nullptr;  // operands_hh of the next step: the row of this thread's i-th sequence is global(i)
  int64_t next_alive = 0;

  const BackwardParams& p() const { return backward.p_; }
  int64_t state(int64_t i) const { return (d * backward.s_.B + subset.sequence(i)) * backward.s_.H; }
  int64_t unit_row(int64_t i) const { return subset.global(i) * backward.ld_unit_; }

  // For sequences of length 0, the gradients of the final states are those of the initial states.
  void begin() const {
    int64_t begin, end;
    member.share(subset.count, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      if (subset.length(i) > 0) continue;
      each_vector_of<C>(backward.s_.H, [&](int64_t j, int n) {
        store_state<C>(p().dh0, state(i) + j, load_state<C>(p().dh_n, state(i) + j, n), n);
        store_state<C>(p().dc0, state(i) + j, load_state<C>(p().dc_n, state(i) + j, n), n);
      });
    }
  }

  // Whether bptt_steps cuts the gradient of the state between step t and the next one.
  bool cut(int64_t i, int64_t t) const {
    if (p().bptt_steps <= 0) return false;
    const int64_t next_step = d == 0 ? t + 1 : subset.length(i) - t;
    return next_step % p().bptt_steps == 0;
  }

  void step(int64_t nth, int64_t k) {
    const int64_t t = backward.time(d, nth), alive = subset.alive(t, next_alive), first = dir.first[k];
    finish_sequences(alive);
    multiply(0, std::min(alive, next_alive));
    member.sync();
    int64_t begin, end;
    member.share(alive, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = first + subset.global(i);
      row(i, r);
      if constexpr (kPairs) round(r);
    }
    member.sync();
    next = dir.operands_hh + first * backward.ld_operand_;
    next_alive = alive;
  }

  // Where the row r of the chunk is in product_ih and product_hh.
  int64_t product_row(int64_t r) const { return (backward.has_product_rows() ? r : worker) * backward.ld_gates_; }

  // Makes operands of row r of the chunk.
  void round(int64_t r) const {
    const auto make = [&](const C* product, Operand<C>* operands) {
      load_operands<C>(DType::f32, product + product_row(r), backward.G_,
                       const_cast<C*>(items_of<C>(operands + r * backward.ld_operand_)));
    };
    make(dir.product_ih, dir.operands_ih);
    if (!backward.has_one_side()) make(dir.product_hh, dir.operands_hh);
  }

  // Moves what the first step of the next chunk reads out of the way of that chunk; `k` is the last step of this one.
  void keep_last(int64_t k) {
    int64_t begin, end;
    member.share(next_alive, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = subset.global(i) * backward.ld_operand_;
      std::copy_n(dir.operands_hh + dir.first[k] * backward.ld_operand_ + at, item_count(backward.G_) * kItemValues,
                  dir.next + at);
    }
    next = dir.next;
  }

  // product_hh W_hh of the next step for the sequences [begin, end).
  void multiply(int64_t begin, int64_t end) const {
    if (begin >= end) return;
    int64_t p0, p1;
    member.share(backward.hh_.count(), 1, &p0, &p1);
    const DirectionWeights& w = p().weights[d];
    const auto row_of = [&](int64_t i) -> const void* { return next + subset.global(i) * backward.ld_operand_; };
    const auto to = [&](int64_t i, GemmColumn at) { return dir.dh + unit_row(i) + at.column; };
    gemm(
        begin, end, p0, p1, DirectRows<C, decltype(row_of)>{row_of},
        backward.panels(backward.hh_, dir.hh, w.dtype, w.w_hh, panel_buffer),
        [&](int64_t i, GemmColumn at) -> const void* { return to(i, at); },
        [&](int64_t i, GemmColumn at, V value, int n) { store_part(to(i, at), value, n); });
  }

  // Writes the gradients of h0 and c0 of the sequences whose first step has been processed.
  void finish_sequences(int64_t alive) const {
    if (alive >= next_alive || (!p().dh0 && !p().dc0)) return;
    multiply(alive, next_alive);
    member.sync();
    int64_t begin, end;
    member.share(next_alive - alive, 1, &begin, &end);
    for (int64_t i = alive + begin; i < alive + end; ++i)
      each_vector_of<C>(backward.s_.H, [&](int64_t j, int n) {
        store_state<C>(p().dh0, state(i) + j, through_h(i, j, n), n);
        if constexpr (Cell::kCellState)
          store_state<C>(p().dc0, state(i) + j, load_part(dir.carry_c + unit_row(i) + j, n), n);
      });
    member.sync();
  }

  // The gradient of h that comes from the next step: through W_hh and past the gates.
  DLK_INLINE V through_h(int64_t i, int64_t j, int n) const {
    const V product = backward.dropped(d, subset.sequence(i), j, n, load_part(dir.dh + unit_row(i) + j, n));
    return product + load_part(dir.carry_h + unit_row(i) + j, n);
  }

  // The backward of one row of the chunk, of this thread's i-th sequence.
  void row(int64_t i, int64_t r) const {
    const Row& at = dir.rows[r];
    const int64_t H = backward.s_.H, mask_row = backward.row_at(d, at.t, at.b) * H;
    const bool joining = i >= next_alive, is_cut = cut(i, at.t), normalised = backward.v_.normalised;
    const Record& record = backward.record_;
    const C *const saved = backward.saved(d, at), *const before = backward.saved_past(d, at);
    const int64_t dy = p().dy.data ? backward.layout_.at(p().dy, at.t, at.b) + d * H : 0;
    C *const carry_h = dir.carry_h + unit_row(i), *const gates_ih = dir.gates_ih + r * backward.ld_gates_,
             *const gates_hh = dir.gates_hh + r * backward.ld_gates_;
    const auto zoneout = [&](const uint8_t* mask, double rate) {
      return Zoneout<C>{mask ? mask + mask_row : nullptr, static_cast<C>(rate)};
    };
    const Zoneout<C> zone_h = zoneout(backward.v_.mask_h, backward.v_.zoneout_h);
    // The gradient of the cell's own h'. What belongs to the old h goes to carry_h.
    const auto of_output = [&](int64_t j, int n) __attribute__((always_inline)) {
      V dh = p().dy.data ? load_any<C>(p().dy.dtype, p().dy.data, dy + j, n) : V::zero();
      if (joining) {
        dh = dh + load_state<C>(p().dh_n, state(i) + j, n);
      } else if (!is_cut) {
        dh = dh + through_h(i, j, n);
      }
      V kept, rest;
      zone_h.divide(j, n, dh, &kept, &rest);
      store_part(carry_h + j, kept, n);
      return rest;
    };
    if constexpr (Cell::kCellState) {
      C* const carry_c = dir.carry_c + unit_row(i);
      const Zoneout<C> zone_c = zoneout(backward.v_.mask_c, backward.v_.zoneout_c);
      const auto factors = [&](int64_t j, int n, V seen_c, V* to) __attribute__((always_inline)) {
        V slots[Cell::kSaved];
        DLK_UNROLL
        for (int k = 0; k < Cell::kBounded; ++k) slots[k] = record.load(saved, k, j, n);
        slots[Cell::kC] = seen_c;
        const V previous =
            before ? load_part(before + record.at.zoned_c + j, n) : load_state<C>(p().c0, state(i) + j, n);
        Cell::factors(slots, previous, to);
      };
      // From the gradient of c' before zoneout, without that of the c' after it, to the gates and the old c.
      const auto of_state = [&](int64_t j, int n, V dc, const V* factor) __attribute__((always_inline)) {
        V later = V::zero();
        if (joining) {
          later = load_state<C>(p().dc_n, state(i) + j, n);
        } else if (!is_cut) {
          later = load_part(carry_c + j, n);
        }
        V kept, rest;
        zone_c.divide(j, n, later, &kept, &rest);
        V through = dc + rest, dgates[Cell::kGates];
        Cell::backward(factor, V::zero(), &through, dgates);  // the gradient of o is there already
        DLK_UNROLL
        for (int g = 0; g < Cell::kO; ++g) store_part(gates_ih + g * H + j, dgates[g], n);
        store_part(carry_c + j, through + kept, n);
      };
      if (!normalised) {
        each_vector_of<C>(H, [&](int64_t j, int n) __attribute__((always_inline)) {
          V factor[Cell::kFactors];
          factors(j, n, load_part(saved + record.at.c + j, n), factor);
          const V dh = of_output(j, n);
          store_part(gates_ih + Cell::kO * H + j, dh * factor[Cell::kFactorO], n);
          of_state(j, n, dh * factor[Cell::kFactorH], factor);
        });
        return;
      }
      const V mean = V::set1(saved[record.at.moments + kMeanOfC]), scale = V::set1(saved[record.at.moments + kOfC]);
      C* const of_c = dir.of_c + r * backward.ld_unit_;
      V sum = V::zero(), along = V::zero();
      const auto normalised_c = [&](int64_t j, int n) __attribute__((always_inline)) {
        return (load_part(saved + record.at.c + j, n) - mean) * scale;
      };
      each_vector_of<C>(H, [&](int64_t j, int n) __attribute__((always_inline)) {
        const V c = normalised_c(j, n), gain = load_part(dir.constants.g_c + j, n);
        V factor[Cell::kFactors];
        factors(j, n, fma(c, gain, load_part(dir.constants.b_c + j, n)), factor);
        const V dh = of_output(j, n), of_seen = dh * factor[Cell::kFactorH];
        store_part(gates_ih + Cell::kO * H + j, dh * factor[Cell::kFactorO], n);
        store_part(of_c + j, of_seen, n);
        sum = fma(of_seen, gain, sum);  // lanes from n on have a gain of 0
        along = fma(of_seen * gain, c, along);
      });
      const V mean_of = V::set1(hsum(sum) / static_cast<C>(H)), slope = V::set1(hsum(along) / static_cast<C>(H));
      each_vector_of<C>(H, [&](int64_t j, int n) __attribute__((always_inline)) {
        const V c = normalised_c(j, n), gain = load_part(dir.constants.g_c + j, n);
        V factor[Cell::kFactors];
        factors(j, n, V::zero(), factor);
        factor[Cell::kFactorH] = V::zero();
        const V d = rounded_product(load_part(of_c + j, n), gain) - mean_of;
        of_state(j, n, fnma(c, slope, d) * scale, factor);
      });
    } else {
      each_vector_of<C>(H, [&](int64_t j, int n) __attribute__((always_inline)) {
        V slots[Cell::kSaved], dgates[Cell::kGateGrads];
        DLK_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k) slots[k] = record.load(saved, k, j, n);
        const V dh = of_output(j, n), old_h = backward.past_h(d, at, before, j, n);
        const V direct = Cell::backward(slots, old_h, dh, dgates);
        store_part(carry_h + j, load_part(carry_h + j, n) + direct, n);
        DLK_UNROLL
        for (int g = 0; g < Cell::kGates; ++g) {
          store_part(gates_ih + g * H + j, dgates[g], n);
          store_part(gates_hh + g * H + j, dgates[g == Cell::kPartedGate ? Cell::kGates : g], n);
        }
      });
      if (!normalised) return;
    }
    each_normalised_part<Cell>(H, [&](int part, int64_t from, int64_t size) {
      const int64_t product = product_row(r) + from;
      const auto values = [&](int slot) {
        return [&record, saved, slot, from](int64_t j, int n)
                   __attribute__((always_inline)) { return record.load(saved, slot, from + j, n); };
      };
      normalise_backward(gates_ih + from, dir.constants.g_ih + from, values(Record::kInput), size,
                         saved[record.at.moments + kOfInput + part], dir.product_ih + product);
      normalise_backward(gates_hh + from, dir.constants.g_hh + from, values(Record::kHidden), size,
                         saved[record.at.moments + kOfHidden + part], dir.product_hh + product);
    });
  }
};

DLK_ISA_END
