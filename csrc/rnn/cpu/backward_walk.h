// The steps of the backward, for the sequences and units of one thread (see backward.h).
// `nth` is a step's number in the order of the backward. "Next" means next in the order of
// the forward: the step that the backward processed just before.
#pragma once

#include "rnn/cpu/backward.h"

DLK_ISA_BEGIN

template <class C, class Cell>
struct Backward<C, Cell>::Walk {
  const Backward& backward;
  const Direction& dir;
  Member member;
  SequenceSubset subset;
  C* panel_buffer;
  int d;
  // The gate gradients of the next step, and its number of alive sequences.
  const C* next_gates = nullptr;  // as items (tile.h)
  int64_t next_alive = 0;
  bool reverse_panels = false;     // alternates from step to step, as in Forward::Walk::step_tiles
  const Row* step_rows = nullptr;  // the rows of the current step, null between steps

  struct CellRow;  // backward_cells.h

  const LayerShape& s() const { return backward.s_; }
  int64_t state(int64_t i, int64_t features) const { return (d * s().B + subset.sequence(i)) * features; }
  C* carry(int64_t i) const { return dir.carry + subset.global(i) * backward.ld_unit_; }
  // Row of the i-th sequence relative to its step's first row.
  int64_t in_step(int64_t i) const { return subset.global(i); }

  // For sequences of length 0, the gradients of the final states are those of the initial states.
  void begin() const {
    int64_t begin, end;
    member.share(subset.count, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      if (subset.length(i) > 0) continue;
      pass_state(backward.p_.dh0, backward.p_.dh_n, state(i, backward.O_), backward.O_);
      pass_state(backward.p_.dc0, backward.p_.dc_n, state(i, s().H), s().H);
    }
  }

  static void pass_state(const StateTensor<void*>& to, const StateTensor<const void*>& from, int64_t at,
                         int64_t count) {
    for (int64_t j = 0; j < count; j += V::size) {
      const int n = static_cast<int>(std::min<int64_t>(V::size, count - j));
      store_state<C>(to, at + j, load_state<C>(from, at + j, n), n);
    }
  }

  // Whether no gradient of the state passes between step t and the next one: at a reset, and where bptt_steps cuts it.
  // There is a next step unless the sequence is_joining.
  bool cut(int64_t i, int64_t t) const {
    if (subset.is_reset(d, d == 0 ? t + 1 : t - 1, i)) return true;
    if (backward.p_.bptt_steps <= 0) return false;
    const int64_t next_step = d == 0 ? t + 1 : subset.length(i) - t;
    return next_step % backward.p_.bptt_steps == 0;
  }

  void step(int64_t nth, int64_t k, int64_t parity) {
    const int64_t t = backward.time(d, nth), alive = subset.alive(t, next_alive), first = dir.first[k];
    finish_sequences(alive);
    step_rows = dir.rows + first;
    if constexpr (Cell::kCellState) {  // only the lstm has projections
      if (s().P) {
        recurrent(t, alive, first, parity, [&](const CellRow& row, int64_t j, int n, V dh) {
          V total = dh + row.incoming(j, n);
          total.store(backward.proj(d, parity) + row.row * backward.ld_proj_ + j);
          if constexpr (kPairs)
            store_operands<C>(backward.proj_operands(d, parity) + row.row * backward.ld_proj_ + j, total, n);
        });
        member.sync();
        through_projection(alive, first, parity);
      }
    }
    if (!s().P) {
      recurrent(t, alive, first, parity,
                [&](const CellRow& row, int64_t j, int n, V dh) { row.cell(j, n, dh + row.incoming(j, n)); });
    }
    next_gates = backward.operand(d, parity) + first * (backward.ld_operand_ / kItemValues);
    next_alive = alive;
    reverse_panels = !reverse_panels;
    step_rows = nullptr;
  }

  void finish() { finish_sequences(0); }

  // Whether sequence i has no next step: its backward begins with this one, from dh_n and dc_n.
  bool is_joining(int64_t i) const { return i >= next_alive; }

  // Calls use(row, column, n, dh) with dh = dgates(next) W_hh for all `alive` sequences and this thread's columns.
  template <class Use>
  void recurrent(int64_t t, int64_t alive, int64_t first, int64_t parity, Use use) const {
    products(
        0, alive, [&](int64_t i) { return is_joining(i) || cut(i, t); },
        [&](int64_t i, auto each_vector) __attribute__((always_inline)) {
          const CellRow row(*this, i, first + in_step(i), parity);
          each_vector([&](int64_t j, int n, V dh) __attribute__((always_inline)) { use(row, j, n, dh); });
        });
  }

  // Calls sink(i, each_vector) for the sequences [begin, end). each_vector(use) calls use(column, n, dh) with
  // dh = dgates(next) W_hh, or with 0 where skip(i) is true.
  template <class Skip, class Sink>
  DLK_INLINE void products(int64_t begin, int64_t end, Skip skip, Sink sink) const {
    const PanelShape& shape = backward.hh_;
    const Panels<C> panels = backward.panels(shape, dir.hh, d, backward.p_.weights[d].w_hh, panel_buffer);
    // Of the operands, in items.
    const int64_t slot = item_count(s().H), head = slot * (Cell::kHasPartedGate ? Cell::kPartedGate : Cell::kGates),
                  ld = backward.ld_operand_ / kItemValues;
    TileBuffer<C> out;
    int64_t p0, p1;
    member.share(shape.count(), 1, &p0, &p1);
    for (int64_t turn = p0; turn < p1; ++turn) {
      const int64_t p = reverse_panels ? p1 - 1 - (turn - p0) : turn;
      const int vectors = shape.vectors_in(p), width = vectors * V::size, onward = reverse_panels ? -1 : 1;
      Panel<C> panel{};
      Ahead<C> ahead;
      if (turn + 1 < p1) ahead = panels.ahead(p + onward, p + onward + 1, end - begin);
      int rows;
      for (int64_t i0 = begin; i0 < end; i0 += rows) {
        rows = next_tile(end - i0, vectors);
        const C *a[kMaxRows], *tail[kMaxRows];
        bool skipped[kMaxRows], any = false;
        for (int r = 0; r < rows; ++r) {
          skipped[r] = skip(i0 + r);
          any |= !skipped[r];
          // A matrix unit wants rows with equal distances.
          a[r] = skipped[r] && !kTiles ? backward.zeros_ : next_gates + in_step(i0 + r) * ld;
          tail[r] = skipped[r] && !kTiles ? backward.zeros_ : a[r] + Cell::kGates * slot;
        }
        if (any && turn == p0 && member.size > 1) collect(rows, a, kSlots * slot);
        if (any) {
          if (!panel.data) panel = panels.at(p);
          run_tile(rows, a, head, panel, out.data, false, ahead, [&](int part, int parts) {
            for (int r = part; r < rows; r += parts) fetch(i0 + r, shape.column(p, 0), vectors);
          });
          // For the gru the product above covers r and z; this one adds n's hidden half, stored behind its input half.
          if constexpr (Cell::kHasPartedGate)
            run_tile(rows, tail, slot, panel.from(head), out.data, true, ahead, [](int, int) {});
          for (int r = 0; kTiles && r < rows; ++r)
            if (skipped[r]) std::fill_n(out.data + r * width, width, C(0));
        } else {
          std::fill_n(out.data, rows * width, C(0));
        }
        for (int r = 0; r < rows; ++r)
          sink(i0 + r, [&](auto use) __attribute__((always_inline)) {
            for (int v = 0; v < vectors; ++v)
              use(shape.column(p, v), shape.valid(p, v), V::load(out.data + r * width + v * V::size));
          });
      }
    }
  }

  // Prefetches the saved record of sequence i at this step, for the units from j on.
  DLK_INLINE void fetch(int64_t i, int64_t j, int vectors) const {
    if (s().P || !step_rows) return;
    const Row& at = step_rows[in_step(i)];
    const C* saved = backward.saved_record(d, at.t, at.b);
    for (int k = 0; k < (backward.record_.keeps_state ? Cell::kSaved : Cell::kStateSlot); ++k)
      for (int v = 0; v < vectors; ++v) backward.record_.fetch(saved, k, j + v * V::size);
  }

  void through_projection(int64_t alive, int64_t first, int64_t parity) const {
    const Operand<C>* dproj = backward.proj_operands(d, parity);
    const auto row = [&](int64_t i) { return items_of<C>(dproj + (first + in_step(i)) * backward.ld_proj_); };
    int64_t p0, p1;
    member.share(backward.hr_.count(), 1, &p0, &p1);
    const Operand<C>* dgates = backward.operand_values(d, parity);
    gemm(
        0, alive, p0, p1, DirectRows<C, decltype(row)>{row},
        backward.panels(backward.hr_, dir.hr, d, backward.p_.weights[d].w_hr, panel_buffer),
        [&](int64_t i, GemmColumn at) -> const void* {
          return dgates + (first + in_step(i)) * backward.ld_operand_ + at.column;
        },
        [&](int64_t i, GemmColumn at, V dh, int n) {
          CellRow(*this, i, first + in_step(i), parity).cell(at.column, n, dh);
        });
  }

  // Writes the gradients of h0 and c0 of the sequences whose first step has been processed. They are zero if that step
  // was reset, which only the first step in time can be.
  void finish_sequences(int64_t alive) const {
    if (alive >= next_alive) return;
    const auto is_dropped = [&](int64_t i) { return d == 0 && subset.is_reset(d, 0, i); };
    if (backward.p_.dh0) {
      products(alive, next_alive, is_dropped, [&](int64_t i, auto each_vector) {
        const bool dropped = is_dropped(i);
        each_vector([&](int64_t j, int n, V dh) {
          if constexpr (Cell::kDirectPath) dh = dropped ? V::zero() : dh + V::load(carry(i) + j);
          store_state<C>(backward.p_.dh0, state(i, backward.O_) + j, dh, n);
        });
      });
    }
    if (backward.p_.dc0 && member.rank == 0) {
      for (int64_t i = alive; i < next_alive; ++i) {
        void* to = advance(backward.p_.dc0.data, backward.p_.dc0.dtype, state(i, s().H));
        if (is_dropped(i)) {
          std::memset(to, 0, s().H * item_size(backward.p_.dc0.dtype));
        } else {
          store_row(backward.p_.dc0.dtype, to, s().H, carry(i));
        }
      }
    }
  }
};

DLK_ISA_END
