// The entry of the backward in the kernel table of one instruction set.
#pragma once

#include "rnn/cpu/backward_cells.h"
#include "rnn/cpu/backward_products.h"
#include "rnn/cpu/entry.h"

DLK_ISA_BEGIN

template <class C, class Cell>
DLK_NOINLINE int backward_as(const BackwardParams& params, const Plan& plan, const Runtime& runtime,
                             const SequenceLayout& layout) {
  Scratch scratch;
  Backward<C, Cell> work(params, plan, layout);
  work.carve(scratch);
  scratch.allocate();
  work.carve(scratch);
  work.begin();
  return run_directions(params.shape, plan, runtime, work);
}

inline int backward_entry(const BackwardParams& params, const Plan& plan, const Runtime& runtime,
                          const SequenceLayout& layout) {
  return with_cell(params.shape.cell, [&](auto cell) {
    using Cell = decltype(cell);
    return with_compute_type(params.shape.dtype, [&](auto zero) {
      return backward_as<decltype(zero), Cell>(params, plan, runtime, layout);
    });
  });
}

DLK_ISA_END
