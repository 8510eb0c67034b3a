// The entries of the kernel table of one instruction set: they pick the template instance for the cell and dtype of a
// call. backward_entry.h has that of the backward, which weights of fewer bits do without.
#pragma once

#include "rnn/cells/elman.h"
#include "rnn/cells/gru.h"
#include "rnn/cells/lstm.h"
#include "rnn/cpu/forward_dot.h"
#include "rnn/cpu/table.h"

DLK_ISA_BEGIN

template <class F>
DLK_INLINE auto with_cell(CellKind cell, F f) {
  switch (cell) {
    case CellKind::lstm:
      return f(LstmCell{});
    case CellKind::gru:
      return f(GruCell{});
    case CellKind::rnn_tanh:
      return f(ElmanCell<false>{});
    case CellKind::rnn_relu:
      return f(ElmanCell<true>{});
  }
  __builtin_unreachable();
}

// Runs `work` for all directions: concurrently if the plan says so and the team has two threads, else one by one.
template <class Work>
DLK_INLINE int run_directions(const LayerShape& shape, const Plan& plan, const Runtime& runtime, Work& work) {
  Barrier barriers[3];
  auto body = [&](int rank, int size) {
    if (plan.directions_side_by_side && size >= 2) {
      const int d = rank % 2;
      work.run(Member{rank / 2, d == 0 ? (size + 1) / 2 : size / 2, &barriers[d]}, rank, d);
    } else {
      for (int d = 0; d < shape.D; ++d) work.run(Member{rank, size, &barriers[0]}, rank, d);
    }
    const Member all{rank, size, &barriers[2]};
    all.sync();
    work.finish(all);
  };
  return run_team(runtime, plan.threads, plan.patience_us, body);
}

template <class C, class Cell>
DLK_NOINLINE int forward_as(const ForwardParams& params, const void* panels, const Plan& plan, const Runtime& runtime,
                            const SequenceLayout& layout) {
  Scratch scratch;
  Forward<C, Cell> work(params, plan, layout);
  work.carve(scratch);
  scratch.allocate();
  work.carve(scratch);
  if (panels) work.set_packed(static_cast<const C*>(panels));
  return run_directions(params.shape, plan, runtime, work);
}

inline int forward_entry(const ForwardParams& params, const void* panels, const Plan& plan, const Runtime& runtime,
                         const SequenceLayout& layout) {
  return with_cell(params.shape.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return with_compute_type(params.shape.dtype, [&](auto zero) {
      return forward_as<decltype(zero), Cell>(params, panels, plan, runtime, layout);
    });
  });
}

template <class C>
DLK_INLINE size_t panel_bytes_as(const LayerShape& shape) {
  return WeightLayout(shape, Vec<C>::size, true).total * sizeof(C) * shape.D;
}

inline size_t panel_bytes_entry(const LayerShape& shape) {
  return with_compute_type(shape.dtype, [&](auto zero) { return panel_bytes_as<decltype(zero)>(shape); });
}

template <class C, class Cell>
DLK_NOINLINE int pack_as(const LayerShape& shape, const DirectionWeights* weights, void* panels) {
  const WeightLayout layout(shape, Vec<C>::size, true);
  for (int d = 0; d < shape.D; ++d)
    pack_weights<C, Cell>(Member{0, 1, nullptr}, shape, weights[d], layout, static_cast<C*>(panels) + d * layout.total);
  return 0;
}

inline void pack_entry(const LayerShape& shape, const DirectionWeights* weights, void* panels) {
  with_cell(shape.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return with_compute_type(shape.dtype,
                             [&](auto zero) { return pack_as<decltype(zero), Cell>(shape, weights, panels); });
  });
}

DLK_ISA_END
