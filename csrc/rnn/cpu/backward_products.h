// The GEMMs of the backward over the gate gradients of a chunk of steps (see backward.h).
#pragma once

#include "rnn/cpu/backward.h"

DLK_ISA_BEGIN

// Computes dx for the rows of one chunk and adds their share to the weight gradients; with `first` it overwrites those.
// Also copies the gate gradients out where the caller wants them.
template <class C, class Cell>
void Backward<C, Cell>::chunk_products(const Member& team, int worker, int d, int64_t parity, bool first) {
  const Direction& dir = direction_[d];
  const int64_t rows = dir.row_count, H = s_.H;
  copy_gate_grads(team, d, parity, rows);
  if (p_.dx.data) {
    const C* operands = operand(d, parity);
    const auto row = [&](int64_t r) { return operands + r * (ld_operand_ / kItemValues); };
    const GemmShare share(team, rows, ih_, fresh_);
    const auto out = [&](int64_t r, GemmColumn at) -> const void* {
      const Row& to = dir.rows[r];
      if (d == 1) return dir.dx + layout_.row(to.t, to.b) * s_.I + at.column;
      return advance(p_.dx.data, p_.dx.dtype, layout_.at(p_.dx, to.t, to.b) + at.column);
    };
    const Panels<C> b = panels(ih_, dir.ih, d, p_.weights[d].w_ih, panel_[worker]);
    gemm(share.m0, share.m1, share.p0, share.p1, DirectRows<C, decltype(row)>{row}, b, out,
         [&](int64_t r, GemmColumn at, V value, int n) {
           const Row& to = dir.rows[r];
           if (d == 1) {
             value.store(dir.dx + layout_.row(to.t, to.b) * s_.I + at.column, n);
           } else {
             store_any<C>(p_.dx.dtype, p_.dx.data, layout_.at(p_.dx, to.t, to.b) + at.column, value, n);
           }
         });
  }
  if (!wants_weights()) return;

  const PanelShape xs = PanelShape::plain(rows, s_.I, V::size), hs = PanelShape::plain(rows, O_, V::size),
                   os = PanelShape::plain(s_.P ? rows : 0, H, V::size);
  int64_t task = 0;
  const auto mine = [&] { return task++ % team.size == team.rank; };
  for (int64_t p = 0; p < xs.count(); ++p)
    if (mine())
      pack_panel_rows<C>(xs, p, p_.x.dtype, [&](int64_t r) { return x_row(dir.rows[r]); }, dir.x_panels + xs.offset(p));
  for (int64_t p = 0; p < hs.count(); ++p)
    if (mine())
      pack_panel_values<C>(
          hs, p, [&](int64_t r, int64_t j, int n) { return past_h(d, dir.rows[r], j, n); },
          dir.h_panels + hs.offset(p));
  for (int64_t p = 0; s_.P && p < os.count(); ++p)
    if (mine())
      pack_panel_rows<C>(
          os, p, std::is_same_v<C, double> ? DType::f64 : DType::f32,
          [&](int64_t r) -> const void* { return dir.cell_out + r * ld_unit_; }, dir.out_panels + os.offset(p));
  team.sync();

  const auto add = [&](const Operand<C>* left, int64_t left_ld, int64_t M, const PanelShape& shape, const C* packed,
                       C* sum) {
    int64_t begin, end;
    team.share(M, kTiles ? kMaxRows : 24, &begin, &end);
    const TransposedRows<C> a{left, left_ld, rows, block_ld<C>(item_count(rows)), block_[worker]};
    gemm(
        begin, end, 0, shape.count(), a, Panels<C>(shape, packed),
        [&](int64_t m, GemmColumn at) -> const void* { return sum + m * shape.N + at.column; },
        [&](int64_t m, GemmColumn at, V value, int n) {
          C* to = sum + m * shape.N + at.column;
          store_part(to, first ? value : load_part(to, n) + value, n);
        },
        first ? sum : nullptr, shape.N);
  };
  // The share of `gates` gates from slot `from` on.
  const auto add_gates = [&](int from, int gates, const PanelShape& shape, const C* packed, C* sum) {
    const Operand<C>* const left = operand_values(d, parity) + from * slot_;
    if (slot_ == H) return add(left, ld_operand_, gates * H, shape, packed, sum);
    for (int g = 0; g < gates; ++g) add(left + g * slot_, ld_operand_, H, shape, packed, sum + g * H * shape.N);
  };
  add_gates(0, Cell::kGates, xs, dir.x_panels, dir.dw_ih);
  if constexpr (Cell::kHasPartedGate) {
    constexpr int kGate = Cell::kPartedGate;
    add_gates(0, kGate, hs, dir.h_panels, dir.dw_hh);
    add_gates(Cell::kGates, 1, hs, dir.h_panels, dir.dw_hh + kGate * H * O_);
  } else {
    add_gates(0, Cell::kGates, hs, dir.h_panels, dir.dw_hh);
  }
  if (s_.P) add(proj_operands(d, parity), ld_proj_, s_.P, os, dir.out_panels, dir.dw_hr);

  constexpr DType kOperand = kPairs ? DType::bf16 : std::is_same_v<C, double> ? DType::f64 : DType::f32;
  const int64_t columns = (H + V::size - 1) / V::size;  // vectors of a slot
  int64_t begin, end;
  team.share(kSlots * columns, 1, &begin, &end);
  for (int64_t column = begin; column < end; ++column) {
    const int64_t k = column / columns, j = column % columns * V::size;
    const int n = static_cast<int>(std::min<int64_t>(V::size, H - j));
    const Operand<C>* const dgates = operand_values(d, parity) + k * slot_ + j;
    V sum = V::zero();
    for (int64_t r0 = 0; r0 < rows; r0 += kBiasRows) {
      V part = V::zero();
      for (int64_t r = r0; r < std::min(rows, r0 + kBiasRows); ++r)
        part = part + load_any<C>(kOperand, dgates, r * ld_operand_, n);
      sum = sum + part;
    }
    C* to = dir.dbias + k * H + j;
    store_part(to, first ? sum : load_part(to, n) + sum, n);
  }
}

template <class C, class Cell>
const void* Backward<C, Cell>::x_row(const Row& row) const {
  return advance(p_.x.data, p_.x.dtype, layout_.at(p_.x, row.t, row.b));
}

// h before the row's step: n values from output j on.
template <class C, class Cell>
DLK_INLINE Vec<C> Backward<C, Cell>::past_h(int d, const Row& row, int64_t j, int n) const {
  if (row.reset) return V::zero();
  if (row.first) return load_state<C>(p_.h0, (d * s_.B + row.b) * O_ + j, n);
  const C* saved = saved_record(d, past(d, row.t), row.b);
  if (s_.P) return load_part(saved + record_.projected + j, n);
  return Cell::hidden([&](int slot) __attribute__((always_inline)) { return record_.load(saved, slot, j, n); });
}

template <class C, class Cell>
void Backward<C, Cell>::copy_gate_grads(const Member& team, int d, int64_t parity, int64_t rows) const {
  if (!p_.gate_grads) return;
  int64_t begin, end;
  team.share(rows, 1, &begin, &end);
  for (int64_t r = begin; r < end; ++r) {
    const Row& row = direction_[d].rows[r];
    const int64_t to = d * s_.rows + layout_.row(row.t, row.b), n = kSlots * s_.H;
    std::memcpy(static_cast<C*>(p_.gate_grads) + to * n, gates(d, parity) + r * ld_gates_, n * sizeof(C));
    if (p_.proj_grads)
      std::memcpy(static_cast<C*>(p_.proj_grads) + to * s_.P, proj(d, parity) + r * ld_proj_, s_.P * sizeof(C));
  }
}

template <class C, class Cell>
void Backward<C, Cell>::store_weight_grads(const Member& team, int d) const {
  if (!wants_weights()) return;
  const Direction& dir = direction_[d];
  const DirectionGrads& to = p_.grads[d];
  const DirectionWeights& w = p_.weights[d];
  const auto store = [&](void* out, const C* sum, int64_t n) {
    int64_t begin, end;
    team.share(n, 1024, &begin, &end);
    if (out && out != sum && begin < end) store_row(w.dtype, advance(out, w.dtype, begin), end - begin, sum + begin);
  };
  store(to.w_ih, dir.dw_ih, G_ * s_.I);
  store(to.w_hh, dir.dw_hh, G_ * O_);
  store(to.w_hr, dir.dw_hr, s_.P * s_.H);
  store(to.b_ih, dir.dbias, G_);
  if constexpr (Cell::kHasPartedGate) {
    constexpr int kGate = Cell::kPartedGate;
    store(to.b_hh, dir.dbias, kGate * s_.H);
    if (to.b_hh) store(advance(to.b_hh, w.dtype, kGate * s_.H), dir.dbias + G_, s_.H);
  } else {
    store(to.b_hh, dir.dbias, G_);
  }
}

DLK_ISA_END
