// The GEMMs and the column sums of the backward over the gradients of a chunk of steps (backward.h).
#pragma once

#include "rnn/cpu/variants/backward.h"

DLK_ISA_BEGIN

// Computes dx for the rows of one chunk and adds their share to the weight gradients; with `first` it overwrites those.
template <class C, class Cell>
void VariantBackward<C, Cell>::chunk_products(const Member& team, int worker, int d, int64_t steps, bool first) {
  const Direction& dir = direction_[d];
  const int64_t rows = dir.first[steps];
  if (p_.dx.data) input_gradient(team, worker, d, rows);
  if (!wants_weights()) return;

  const PanelShape xs = PanelShape::plain(rows, s_.I, V::size), hs = PanelShape::plain(rows, s_.H, V::size);
  int64_t task = 0;
  const auto mine = [&] { return task++ % team.size == team.rank; };
  const auto x_row = [&](int64_t r) -> const void* {
    return advance(p_.x.data, p_.x.dtype, layout_.at(p_.x, dir.rows[r].t, dir.rows[r].b));
  };
  for (int64_t p = 0; p < xs.count(); ++p)
    if (mine()) pack_panel_rows<C>(xs, p, p_.x.dtype, x_row, dir.x_panels + xs.offset(p));
  for (int64_t p = 0; p < hs.count(); ++p)
    if (mine())
      pack_panel_values<C>(
          hs, p,
          [&](int64_t r, int64_t j, int n) {
            const Row& row = dir.rows[r];
            return dropped(d, row.b, j, n, past_h(d, row, saved_past(d, row), j, n));
          },
          dir.h_panels + hs.offset(p));
  team.sync();

  const auto add = [&](const Operand<C>* left, const PanelShape& shape, const C* packed, C* sum) {
    int64_t begin, end;
    team.share(G_, 24, &begin, &end);
    const TransposedRows<C> a{left, ld_operand_, rows, block_ld<C>(item_count(rows)), block_[worker]};
    gemm(
        begin, end, 0, shape.count(), a, Panels<C>(shape, packed),
        [&](int64_t m, GemmColumn at) -> const void* { return sum + m * shape.N + at.column; },
        [&](int64_t m, GemmColumn at, V value, int n) {
          C* to = sum + m * shape.N + at.column;
          store_part(to, first ? value : load_part(to, n) + value, n);
        },
        first ? sum : nullptr, shape.N);
  };
  add(dir.operands_ih, xs, dir.x_panels, dir.dw_ih);
  add(dir.operands_hh, hs, dir.h_panels, dir.dw_hh);
  column_sums(team, d, rows, first);
}

template <class C, class Cell>
void VariantBackward<C, Cell>::input_gradient(const Member& team, int worker, int d, int64_t rows) {
  const Direction& dir = direction_[d];
  const auto row = [&](int64_t r) -> const void* { return dir.operands_ih + r * ld_operand_; };
  const GemmShare share(team, rows, ih_, fresh_);
  const auto out = [&](int64_t r, GemmColumn at) -> const void* {
    const Row& to = dir.rows[r];
    if (d == 1) return dir.dx + layout_.row(to.t, to.b) * s_.I + at.column;
    return advance(p_.dx.data, p_.dx.dtype, layout_.at(p_.dx, to.t, to.b) + at.column);
  };
  const DirectionWeights& w = p_.weights[d];
  gemm(share.m0, share.m1, share.p0, share.p1, DirectRows<C, decltype(row)>{row},
       panels(ih_, dir.ih, w.dtype, w.w_ih, panel_[worker]), out, [&](int64_t r, GemmColumn at, V value, int n) {
         const Row& to = dir.rows[r];
         if (d == 1) {
           value.store(dir.dx + layout_.row(to.t, to.b) * s_.I + at.column, n);
         } else {
           store_any<C>(p_.dx.dtype, p_.dx.data, layout_.at(p_.dx, to.t, to.b) + at.column, value, n);
         }
       });
}

// Adds the chunk's part of the gradients of biases and gains. The columns are taken in tiles, in which the rows of a
// partial sum are read along the row: their pages are visited once for each tile.
template <class C, class Cell>
void VariantBackward<C, Cell>::column_sums(const Member& team, int d, int64_t rows, bool first) const {
  const Direction& dir = direction_[d];
  constexpr int kAtOnce = 4, kTile = 128;  // in vectors of columns
  // Adds the columns of `gates` to `sum`, and to each `along.to` their products with along.factor(record, j, n).
  const auto add = [&](int64_t columns, const C* gates, int64_t ld, C* sum, auto... along) {
    constexpr int kSums = 1 + sizeof...(along);
    int64_t begin, end;
    team.share(columns, kAtOnce * V::size, &begin, &end);
    const auto valid = [&](int64_t j) { return static_cast<int>(std::clamp<int64_t>(end - j, 0, V::size)); };
    for (int64_t from = begin; from < end; from += kTile * V::size) {
      const int64_t vectors = std::min<int64_t>(kTile, (end - from + V::size - 1) / V::size);
      V sums[kTile][kSums];
      for (int64_t v = 0; v < vectors; ++v) std::fill_n(sums[v], kSums, V::zero());
      for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
        const int64_t count = std::min(rows - r0, kSumRows);
        [[maybe_unused]] const C* records[kSumRows];  // not used without `along`
        for (int64_t r = 0; r < count; ++r) records[r] = saved(d, dir.rows[r0 + r]);
        for (int64_t v = 0; v < vectors; v += kAtOnce) {
          V parts[kAtOnce][kSums];
          DLK_UNROLL
          for (int k = 0; k < kAtOnce; ++k) std::fill_n(parts[k], kSums, V::zero());
          for (int64_t r = 0; r < count; ++r) {
            DLK_UNROLL
            for (int k = 0; k < kAtOnce; ++k) {
              const int64_t j = from + (v + k) * V::size;
              const int n = valid(j);
              if (n == 0) continue;
              const V value = load_part(gates + (r0 + r) * ld + j, n);
              V* part = parts[k];
              *part = *part + value;
              ((++part, *part = fma(value, along.factor(records[r], j, n), *part)), ...);
            }
          }
          DLK_UNROLL
          for (int k = 0; k < kAtOnce; ++k) {
            if (v + k >= vectors) continue;
            DLK_UNROLL
            for (int i = 0; i < kSums; ++i) sums[v + k][i] = sums[v + k][i] + parts[k][i];
          }
        }
      }
      C* const to[] = {sum, along.to...};
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t j = from + v * V::size;
        const int n = valid(j);
        for (int i = 0; i < kSums; ++i)
          store_part(to[i] + j, first ? sums[v][i] : load_part(to[i] + j, n) + sums[v][i], n);
      }
    }
  };
  if (!v_.normalised) {
    add(G_, dir.gates_ih, ld_gates_, dir.sums.b_ih);
    if constexpr (Cell::kHasPartedGate) add(G_, dir.gates_hh, ld_gates_, dir.sums.b_hh);
    return;
  }
  const auto product = [this](C* to, int slot) {
    const auto factor = [this, slot](const C* record, int64_t j, int n)
                            __attribute__((always_inline)) { return record_.load(record, slot, j, n); };
    return Along<decltype(factor)>{to, factor};
  };
  const auto of_input = product(dir.sums.g_ih, Record::kInput), of_hidden = product(dir.sums.g_hh, Record::kHidden);
  if constexpr (Cell::kHasPartedGate) {
    add(G_, dir.gates_ih, ld_gates_, dir.sums.b_ih, of_input);
    add(G_, dir.gates_hh, ld_gates_, dir.sums.b_hh, of_hidden);
  } else {
    add(G_, dir.gates_ih, ld_gates_, dir.sums.b_ih, of_input, of_hidden);
  }
  if constexpr (Cell::kCellState) {
    const auto normalised = [this](const C* record, int64_t j, int n) __attribute__((always_inline)) {
      const C* const moments = record + record_.at.moments;
      return (load_part(record + record_.at.c + j, n) - V::set1(moments[kMeanOfC])) * V::set1(moments[kOfC]);
    };
    add(s_.H, dir.of_c, ld_unit_, dir.sums.b_c, Along<decltype(normalised)>{dir.sums.g_c, normalised});
  }
}

template <class C, class Cell>
void VariantBackward<C, Cell>::store_weight_grads(const Member& team, int d) const {
  if (!wants_weights()) return;
  const Direction& dir = direction_[d];
  const auto store = [&](DType dtype, void* out, const C* sum, int64_t n) {
    int64_t begin, end;
    team.share(n, 1024, &begin, &end);
    if (out && out != sum && begin < end) store_row(dtype, advance(out, dtype, begin), end - begin, sum + begin);
  };
  const DType of_weights = p_.weights[d].dtype, of_gains = v_.gains[d].dtype;
  store(of_weights, p_.grads[d].w_ih, dir.dw_ih, G_ * s_.I);
  store(of_weights, p_.grads[d].w_hh, dir.dw_hh, G_ * s_.H);
  store(of_weights, p_.grads[d].b_ih, dir.sums.b_ih, G_);
  store(of_weights, p_.grads[d].b_hh, Cell::kHasPartedGate ? dir.sums.b_hh : dir.sums.b_ih, G_);
  if (!v_.normalised) return;
  store(of_gains, gain_grads_[d].ih, dir.sums.g_ih, G_);
  store(of_gains, gain_grads_[d].hh, dir.sums.g_hh, G_);
  if constexpr (Cell::kCellState) {
    store(of_gains, gain_grads_[d].c, dir.sums.g_c, s_.H);
    store(of_gains, gain_grads_[d].c_bias, dir.sums.b_c, s_.H);
  }
}

DLK_ISA_END
