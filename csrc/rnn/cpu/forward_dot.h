// The parts of a step that read weights that are not packed (Plan::dot), and the projection of its outputs (see
// forward.h).
#pragma once

#include "rnn/cpu/forward_walk.h"

DLK_ISA_BEGIN

// Computes the products of x with the unpacked W_ih (Plan::dot), and adds the biases.
template <class C, class Cell>
void Forward<C, Cell>::Walk::project_dot(int64_t rows) const {
  const C* bias = forward.weight_memory_[d] + forward.weights_.bias_at;
  int64_t begin, end;
  member.share(s().H, V::size, &begin, &end);
  const bool converts = !is_compute_type<C>(forward.p_.x.dtype);
  const int64_t ld = block_ld<C>(s().I);
  for (int64_t r = 0; converts && r < rows; ++r)
    load_row<C>(forward.p_.x.dtype, table.x[r], s().I, table.block + r * ld);
  V sums[kDotGroup];
  for (int g = 0; g < Cell::kGates; ++g)
    for (int64_t j = begin; j < end; j += V::size) {
      const int n = static_cast<int>(std::min<int64_t>(V::size, end - j));
      const int64_t column = g * s().H + j;
      for (int64_t r0 = 0; r0 < rows; r0 += kDotGroup) {
        const int count = static_cast<int>(std::min<int64_t>(kDotGroup, rows - r0));
        const C* x[kDotGroup];
        for (int r = 0; r < count; ++r)
          x[r] = converts ? table.block + (r0 + r) * ld : static_cast<const C*>(table.x[r0 + r]);
        dot(count, x, s().I, weights().dtype, weights().w_ih, column, n, sums);
        for (int r = 0; r < count; ++r) put_product(r0 + r, j, g, sums[r] + V::load(bias + column, n), n);
      }
    }
}

template <class C, class Cell>
void Forward<C, Cell>::Walk::step_dot(int64_t t, int64_t parity, int64_t first, int64_t alive) {
  // Units that are held back read their products after those of the next group are stored.
  alignas(64) C hidden[2][kDotGroup][Cell::kGates * V::size];
  V sums[kDotGroup];
  Pending pending(*this, t, parity);
  int64_t begin, end;
  int turn = 0;
  member.share(s().H, V::size, &begin, &end);
  for (int64_t j = begin; j < end; j += V::size) {
    const int n = static_cast<int>(std::min<int64_t>(V::size, end - j));
    for (int64_t i0 = 0; i0 < alive; i0 += kDotGroup, turn ^= 1) {
      const int count = static_cast<int>(std::min<int64_t>(kDotGroup, alive - i0));
      const C* a[kDotGroup];
      for (int r = 0; r < count; ++r) a[r] = h(parity, i0 + r);
      for (int g = 0; g < Cell::kGates; ++g) {
        dot(count, a, forward.O_, weights().dtype, weights().w_hh, g * s().H + j, n, sums);
        for (int r = 0; r < count; ++r) sums[r].store(hidden[turn][r] + g * V::size);
      }
      for (int r = 0; r < count; ++r) pending.add({hidden[turn][r], first + i0 + r, i0 + r, j, n});
    }
  }
}

// h = cell output times W_hr^T (Sak et al. 2014).
template <class C, class Cell>
void Forward<C, Cell>::Walk::project_outputs(int64_t t, int64_t parity, int64_t first, int64_t alive) const {
  if (forward.plan_.recurrence == Plan::dot) {
    int64_t begin, end;
    member.share(s().P, V::size, &begin, &end);
    V sums[kDotGroup];
    for (int64_t j = begin; j < end; j += V::size) {
      const int n = static_cast<int>(std::min<int64_t>(V::size, end - j));
      for (int64_t i0 = 0; i0 < alive; i0 += kDotGroup) {
        const int count = static_cast<int>(std::min<int64_t>(kDotGroup, alive - i0));
        const C* a[kDotGroup];
        for (int r = 0; r < count; ++r) a[r] = items_of<C>(cell_out(i0 + r));
        dot(count, a, s().H, weights().dtype, weights().w_hr, j, n, sums);
        for (int r = 0; r < count; ++r) emit_projected(t, parity, first + i0 + r, i0 + r, j, n, sums[r]);
      }
    }
    return;
  }
  const PanelShape& shape = forward.weights_.hr;
  int64_t p0, p1;
  member.share(shape.count(), 1, &p0, &p1);
  const auto out_row = [&](int64_t i) { return items_of<C>(cell_out(i)); };
  gemm(
      0, alive, p0, p1, DirectRows<C, decltype(out_row)>{out_row},
      forward.panels(shape, forward.weights_.hr_at, forward.p_.weights[d].w_hr, d, table),
      [&](int64_t i, GemmColumn at) -> const void* { return h(1 - parity, i) + at.column; },
      [&](int64_t i, GemmColumn at, V value, int n) {
        value = products_of(value, forward.weight_memory_[d], forward.weights_.hr_scales, at.column, C(1));
        emit_projected(t, parity, first + i, i, at.column, n, value);
      });
}

DLK_ISA_END
