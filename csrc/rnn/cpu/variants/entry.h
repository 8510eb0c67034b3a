// The entries of the table of kernels for variants: they pick the template instance for the cell and dtype of a call.
#pragma once

#include "rnn/cpu/entry.h"
#include "rnn/cpu/variants/backward_products.h"
#include "rnn/cpu/variants/backward_rows.h"
#include "rnn/cpu/variants/forward_rows.h"
#include "rnn/cpu/variants/table.h"

DLK_ISA_BEGIN

template <class Work, class Params>
DLK_NOINLINE int run_variant(const Params& params, const Plan& plan, const Runtime& runtime,
                             const SequenceLayout& layout) {
  Scratch scratch;
  Work work(params, plan, layout);
  work.carve(scratch);
  scratch.allocate();
  work.carve(scratch);
  return run_directions(params.layer.shape, plan, runtime, work);
}

template <class F>
DLK_INLINE int with_variant_cell(const LayerShape& shape, F f) {
  return with_compute_type(shape.dtype, [&](auto zero) {
    using C = decltype(zero);
    return shape.cell == CellKind::lstm ? f(C(), LstmCell{}) : f(C(), GruCell{});
  });
}

inline int variant_forward_entry(const VariantForwardParams& params, const Plan& plan, const Runtime& runtime,
                                 const SequenceLayout& layout) {
  return with_variant_cell(params.layer.shape, [&](auto zero, auto cell) {
    return run_variant<VariantForward<decltype(zero), decltype(cell)>>(params, plan, runtime, layout);
  });
}

inline int variant_backward_entry(const VariantBackwardParams& params, const Plan& plan, const Runtime& runtime,
                                  const SequenceLayout& layout) {
  return with_variant_cell(params.layer.shape, [&](auto zero, auto cell) {
    return run_variant<VariantBackward<decltype(zero), decltype(cell)>>(params, plan, runtime, layout);
  });
}

DLK_ISA_END
