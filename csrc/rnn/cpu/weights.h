// The weights of one direction in the form the forward recurrence reads: panels of
// W_ih, W_hh and W_hr, and the biases in the compute type. The same form serves one call
// (in scratch) and prepacked layers (after a header, see kernels.cpp). Panels of fewer bits exist only prepacked.
#pragma once

#include "core/team.h"
#include "gemm/operands.h"
#include "gemm/narrow_panels.h"
#include "rnn/params.h"

DLK_ISA_BEGIN

struct WeightLayout {
  PanelShape ih, hh, hr;
  bool panels;                                                  // false: the biases alone
  int64_t bias_at, hidden_bias_at, ih_at, hh_at, hr_at, total;  // in elements of the compute type
  struct {
    int64_t scale, sum;
  } ih_scales, hh_scales, hr_scales;  // where the ColumnScales of int8 weights are

  // The elements of the compute type that the panels of a matrix take; those of fewer bits belong to float.
  static int64_t panel_room(const PanelShape& of) {
    constexpr int64_t kInOne = sizeof(float) / sizeof(Stored<float>);
    return (of.elements() + kInOne - 1) / kInOne;
  }

  WeightLayout(const LayerShape& shape, int lanes, bool with_panels) : panels(with_panels) {
    const int gates = gate_count(shape.cell);
    const auto whole = [&](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
    ih = PanelShape::gated(shape.I, shape.H, gates, lanes);
    hh = PanelShape::gated(shape.outputs(), shape.H, gates, lanes);
    hr = PanelShape::plain(shape.H, shape.P, lanes);
    bias_at = 0;
    hidden_bias_at = bias_at + whole(gates * shape.H);
    const auto room = [&](const PanelShape& of) { return with_panels ? whole(panel_room(of)) : 0; };
    int64_t next = hidden_bias_at + whole(shape.H);
    const auto take = [&](int64_t n) { return kWeights == Weights::int8 ? (next += whole(n)) - whole(n) : next; };
    ih_scales = {take(gates * shape.H), take(kQuads ? gates * shape.H : 0)};
    hh_scales = {take(gates * shape.H), take(kQuads ? gates * shape.H : 0)};
    hr_scales = {take(shape.P), take(0)};
    ih_at = next;
    hh_at = ih_at + room(ih);
    hr_at = hh_at + room(hh);
    total = hr_at + room(hr);
  }
};

// The panels that begin at an element of the weights' memory.
template <class C>
DLK_INLINE Stored<C>* stored_panels(C* at) {
  return reinterpret_cast<Stored<C>*>(at);
}

// Those of one matrix, in the memory of the weights.
template <class C, class At>
DLK_INLINE ColumnScales column_scales(C* memory, const At& at) {
  return {reinterpret_cast<float*>(memory + at.scale), reinterpret_cast<int32_t*>(memory + at.sum)};
}

// The products of a vector of columns from their sums. `scale` is that of the row, for quads. They are rounded here, by
// adding 0: a compiler would contract a product with some of the sums that use it but not with others, and the results
// would depend on which code a row takes.
template <class C, class At>
DLK_INLINE Vec<C> products_of(Vec<C> sums, const C* memory, const At& at, int64_t column, C scale) {
  using V = Vec<C>;
  if constexpr (kQuads) {
    const V less = V::load(memory + at.sum + column);  // int32
    return fma(Int8Quads<C>::difference(sums, less), V::load(memory + at.scale + column) * V::set1(scale), V::zero());
  } else if constexpr (kWeights == Weights::int8) {
    return fma(sums, V::load(memory + at.scale + column), V::zero());
  } else {
    return sums;
  }
}

// Adds the two biases of each gate, except for the gru's n, whose hidden bias stays separate.
template <class C, class Cell>
DLK_INLINE void combine_biases(const LayerShape& shape, const DirectionWeights& w, const WeightLayout& layout, C* out) {
  using V = Vec<C>;
  const int64_t H = shape.H, n = Cell::kGates * H;
  C* bias = out + layout.bias_at;
  C* hidden = out + layout.hidden_bias_at;
  for (int64_t j = 0; j < n; j += V::size) {
    const int m = static_cast<int>(n - j < V::size ? n - j : V::size);
    V sum = V::zero();
    if (w.b_ih) sum = load_any<C>(w.dtype, w.b_ih, j, m) + load_any<C>(w.dtype, w.b_hh, j, m);
    sum.store(bias + j);
  }
  if constexpr (Cell::kHasPartedGate) {
    constexpr int kGate = Cell::kPartedGate;
    for (int64_t j = 0; j < H; j += V::size) {
      const int m = static_cast<int>(H - j < V::size ? H - j : V::size);
      V input = V::zero(), own = V::zero();
      if (w.b_ih) {
        input = load_any<C>(w.dtype, w.b_ih, kGate * H + j, m);
        own = load_any<C>(w.dtype, w.b_hh, kGate * H + j, m);
      }
      input.store(bias + kGate * H + j, m);
      own.store(hidden + j);
    }
  }
}

// Packs one thread's share of the panels: if the hidden units are split, the panels that it will read itself.
template <class C, class Cell>
DLK_NOINLINE void pack_weights(const Member& member, const LayerShape& shape, const DirectionWeights& w,
                               const WeightLayout& layout, C* out) {
  if (member.rank == 0) combine_biases<C, Cell>(shape, w, layout, out);
  if (!layout.panels) return;
  const struct {
    const PanelShape* shape;
    const void* weights;
    C* to;
    ColumnScales scales;
  } parts[] = {{&layout.ih, w.w_ih, out + layout.ih_at, column_scales(out, layout.ih_scales)},
               {&layout.hh, w.w_hh, out + layout.hh_at, column_scales(out, layout.hh_scales)},
               {&layout.hr, w.w_hr, out + layout.hr_at, column_scales(out, layout.hr_scales)}};
  for (const auto& part : parts) {
    if (!part.weights) continue;
    int64_t begin, end;
    member.share(part.shape->count(), 1, &begin, &end);
    for (int64_t p = begin; p < end; ++p) {
      Stored<C>* const to = stored_panels<C>(part.to) + part.shape->offset(p);
      if constexpr (kWeights == Weights::given) {
        pack_panel_transposed<C>(*part.shape, p, w.dtype, part.weights, to);
      } else {
        pack_panel_narrow<C>(*part.shape, p, static_cast<const float*>(part.weights), part.scales, to);
      }
    }
  }
}

DLK_ISA_END
