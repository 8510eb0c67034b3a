// Backward pass of one layer with layer normalisation, zoneout or recurrent dropout.
//
// Steps are walked in the opposite order of the forward. A step has two parts, as in forward.h: the product of the next
// step's gradients of W_hh h with W_hh goes to a buffer; then each row goes through the cell's backward and that of the
// normalisation (backward_rows.h). The gradients of the rows of a chunk of steps stay in buffers, from which GEMMs make
// dx and add to the weight gradients (backward_products.h), as in the plain backward (rnn/cpu/backward.h).
#pragma once

#include "core/scratch.h"
#include "core/team.h"
#include "gemm/gemm.h"
#include "rnn/cpu/sequence_layout.h"
#include "rnn/cpu/states.h"
#include "rnn/cpu/variants/forward.h"

DLK_ISA_BEGIN

template <class C, class Cell>
class VariantBackward {
  using V = Vec<C>;
  using Record = VariantRecord<Cell>;
  static constexpr int64_t kSumRows = 16;  // rows in a partial sum of column sums, to keep rounding errors small

 public:
  VariantBackward(const VariantBackwardParams& params, const Plan& plan, const SequenceLayout& layout)
      : p_(params.layer),
        v_(params.variant),
        gain_grads_(params.gains),
        s_(params.layer.shape),
        plan_(plan),
        layout_(layout),
        G_(Cell::kGates * s_.H),
        chunk_(std::max<int64_t>(1, std::min(plan.chunk_steps, layout.steps()))),
        chunk_rows_(chunk_ * s_.B),
        ld_gates_(block_ld<C>(G_)),
        ld_unit_(block_ld<C>(s_.H)),
        ld_operand_(operand_ld<C>(G_)),
        hh_(PanelShape::plain(G_, s_.H, V::size)),
        ih_(PanelShape::plain(G_, s_.I, V::size)),
        fresh_(layout.steps() <= 1),
        record_(s_.H, v_.normalised) {}

  void carve(Scratch& scratch) {
    const bool weights = wants_weights();
    for (int d = 0; d < s_.D; ++d) {
      Direction& dir = direction_[d];
      dir.constants.carve(scratch, G_, s_.H, v_.normalised);
      dir.hh = scratch.take<C>(fresh_ ? 0 : hh_.elements());
      dir.ih = scratch.take<C>(fresh_ || !p_.dx.data ? 0 : ih_.elements());
      // The lstm's gates have the same gradient on both sides.
      const auto gates = [&](bool own, int64_t rows, C* other) {
        return own ? scratch.take<C>(rows * ld_gates_) : other;
      };
      dir.gates_ih = gates(true, chunk_rows_, nullptr);
      dir.gates_hh = gates(Cell::kHasPartedGate, chunk_rows_, dir.gates_ih);
      const int64_t rows = has_product_rows() ? chunk_rows_ : plan_.threads;
      dir.product_ih = gates(v_.normalised, rows, dir.gates_ih);
      dir.product_hh = gates(v_.normalised, rows, dir.gates_hh);
      dir.of_c = scratch.take<C>(keeps_c() ? chunk_rows_ * ld_unit_ : 0);
      if constexpr (kPairs) {
        dir.operands_ih = scratch.take<Operand<C>>(chunk_rows_ * ld_operand_);
        dir.operands_hh = has_one_side() ? dir.operands_ih : scratch.take<Operand<C>>(chunk_rows_ * ld_operand_);
      } else {
        dir.operands_ih = dir.product_ih;
        dir.operands_hh = dir.product_hh;
      }
      dir.next = scratch.take<Operand<C>>(s_.B * ld_operand_);
      dir.dh = scratch.take<C>(s_.B * ld_unit_);
      dir.carry_h = scratch.take<C>(s_.B * ld_unit_);
      dir.carry_c = scratch.take<C>(Cell::kCellState ? s_.B * ld_unit_ : 0);
      dir.rows = scratch.take<Row>(chunk_rows_);
      dir.first = scratch.take<int64_t>(chunk_ + 1);
      // The right-hand sides of the weight-gradient GEMMs, as panels: x and h.
      const auto columns = [&](int64_t n) {
        return weights ? item_count(chunk_rows_) * ((n + V::size - 1) / V::size * V::size) : 0;
      };
      dir.x_panels = scratch.take<C>(columns(s_.I));
      dir.h_panels = scratch.take<C>(columns(s_.H));
      const auto sum = [&](void* out, int64_t n) {
        return is_compute_type<C>(p_.weights[d].dtype) ? static_cast<C*>(out) : scratch.take<C>(weights ? n : 0);
      };
      dir.dw_ih = sum(p_.grads[d].w_ih, G_ * s_.I);
      dir.dw_hh = sum(p_.grads[d].w_hh, G_ * s_.H);
      dir.sums.carve(scratch, weights ? G_ : 0, weights ? s_.H : 0, v_.normalised);
      dir.dx = d == 1 && p_.dx.data ? scratch.take<C>(s_.rows * s_.I) : nullptr;
    }
    for (int m = 0; m < plan_.threads; ++m) {
      block_[m] = scratch.take<C>(kTransposedRows * block_ld<C>(item_count(chunk_rows_)));
      panel_[m] = scratch.take<C>(fresh_ ? std::max(hh_.largest(), ih_.largest()) : 0);
    }
  }

  void run(const Member& team, int worker, int d) {
    prepare(team, d);
    const bool by_rows = plan_.split == Plan::rows;
    Walk walk{*this,
              direction_[d],
              by_rows ? Member{0, 1, nullptr} : team,
              by_rows ? SequenceSubset(layout_, team.rank, team.size) : SequenceSubset(layout_, 0, 1),
              panel_[worker],
              d,
              worker};
    walk.begin();
    team.sync();
    const int64_t steps = layout_.steps();
    for (int64_t nth = 0; nth < steps; nth += chunk_) {
      const int64_t count = std::min(chunk_, steps - nth);
      if (team.rank == 0) number_rows(d, nth, count);
      team.sync();
      for (int64_t k = 0; k < count; ++k) walk.step(nth + k, k);
      team.sync();
      walk.keep_last(count - 1);
      chunk_products(team, worker, d, count, nth == 0);
      team.sync();
    }
    walk.finish_sequences(0);
    team.sync();
    store_weight_grads(team, d);
  }

  // Called after all directions: adds the second direction's dx to the first's, and writes zeros to padding rows.
  void finish(const Member& team) const {
    if (!p_.dx.data || (s_.D == 1 && layout_.uniform())) return;
    int64_t begin, end;
    team.share(s_.B, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = layout_.sequence(i), length = layout_.length(i);
      for (int64_t t = 0; t < length && s_.D == 2; ++t) {
        const int64_t at = layout_.at(p_.dx, t, b);
        const C* other = direction_[1].dx + layout_.row(t, b) * s_.I;
        each_vector_of<C>(s_.I, [&](int64_t j, int n) {
          store_any<C>(p_.dx.dtype, p_.dx.data, at + j,
                       load_any<C>(p_.dx.dtype, p_.dx.data, at + j, n) + load_part(other + j, n), n);
        });
      }
      for (int64_t t = length; t < s_.T && !layout_.packed(); ++t)
        std::memset(advance(p_.dx.data, p_.dx.dtype, layout_.at(p_.dx, t, b)), 0, s_.I * item_size(p_.dx.dtype));
    }
  }

 private:
  struct Row {
    int64_t t, b;  // time step and sequence
    bool first;    // this is the sequence's first step: the state before it is h0, c0
  };

  struct Direction {
    VariantConstants<C> constants;
    C *hh, *ih;                  // panels of the weights
    C *gates_ih, *gates_hh;      // of a chunk: the gradients of the gates on the side of x and on that of h,
    C *product_ih, *product_hh;  // and those of W_ih x and W_hh h, which are the same without layer normalisation
    C* of_c;                     // and that of the normalised c' times its gain plus its bias
    Operand<C>*operands_ih, *operands_hh;  // these as operands of the products: themselves, or rounded (kPairs only)
    Operand<C>* next;                      // operands_hh of the step before the chunk, in the order of the backward
    C* dh;                                 // product_hh W_hh of a step
    C *carry_h, *carry_c;                  // gradients that reach h and c past the gates
    Row* rows;                             // the rows of the chunk
    int64_t* first;                        // first row of each step of the chunk, and the end
    C *x_panels, *h_panels;                // see carve()
    C *dw_ih, *dw_hh, *dx;                 // gradients accumulated so far; dx is the second direction's part
    VariantConstants<C> sums;              // gradients of biases and gains
  };

  bool wants_weights() const { return p_.grads[0].w_ih != nullptr; }
  // Whether gradients are the same on the side of x and on that of h.
  bool has_one_side() const { return !Cell::kHasPartedGate && !v_.normalised; }
  // Whether the buffers of product_ih and product_hh have a row for each row of the chunk, as the gates do. Those that
  // are rounded at once have one for each thread.
  bool has_product_rows() const { return !kPairs || !v_.normalised; }
  bool keeps_c() const { return Cell::kCellState && v_.normalised; }
  // Time of the nth step in the order of the backward, and of the step before t in the order of the forward.
  int64_t time(int d, int64_t nth) const { return d == 0 ? layout_.steps() - 1 - nth : nth; }
  int64_t past(int d, int64_t t) const { return d == 0 ? t - 1 : t + 1; }
  int64_t row_at(int d, int64_t t, int64_t b) const { return d * s_.rows + layout_.row(t, b); }
  const C* saved(int d, const Row& row) const {
    return static_cast<const C*>(p_.saved) + row_at(d, row.t, row.b) * record_.size;
  }
  // The record of the step before; null at a sequence's first step.
  const C* saved_past(int d, const Row& row) const {
    if (row.first) return nullptr;
    return static_cast<const C*>(p_.saved) + row_at(d, past(d, row.t), row.b) * record_.size;
  }
  // h before the row's step, and what recurrent dropout multiplies it by: n values from unit j on.
  DLK_INLINE V past_h(int d, const Row& row, const C* before, int64_t j, int n) const {
    if (before) return load_part(before + record_.slot(Record::kH) + j, n);
    return load_state<C>(p_.h0, (d * s_.B + row.b) * s_.H + j, n);
  }
  DLK_INLINE V dropped(int d, int64_t b, int64_t j, int n, V value) const {
    if (!v_.dropout) return value;
    return value * load_part(static_cast<const C*>(v_.dropout) + (d * s_.B + b) * s_.H + j, n);
  }

  void prepare(const Member& team, int d) const {
    const Direction& dir = direction_[d];
    const DirectionWeights& w = p_.weights[d];
    if (team.rank == 0) dir.constants.fill(w, v_.gains[d], G_, s_.H);
    const auto pack = [&](const PanelShape& shape, const void* weights, C* panels) {
      int64_t begin, end;
      team.share(shape.count(), 1, &begin, &end);
      for (int64_t p = begin; p < end; ++p) pack_panel_matrix<C>(shape, p, w.dtype, weights, panels + shape.offset(p));
    };
    if (!fresh_) {
      pack(hh_, w.w_hh, dir.hh);
      if (p_.dx.data) pack(ih_, w.w_ih, dir.ih);
    }
    if (!wants_weights() || layout_.steps() > 0) return;  // if there are steps, the first chunk overwrites the sums
    if (team.rank > 0) return;
    std::fill_n(dir.dw_ih, G_ * s_.I, C(0));
    std::fill_n(dir.dw_hh, G_ * s_.H, C(0));
    for (C* sum : {dir.sums.b_ih, dir.sums.b_hh, dir.sums.g_ih, dir.sums.g_hh})
      if (sum) std::fill_n(sum, G_, C(0));
    for (C* sum : {dir.sums.g_c, dir.sums.b_c})
      if (sum) std::fill_n(sum, s_.H, C(0));
  }

  Panels<C> panels(const PanelShape& shape, const C* packed, DType dtype, const void* weights, C* buffer) const {
    return fresh_ ? Panels<C>(shape, pack_panel_matrix<C>, dtype, weights, buffer) : Panels<C>(shape, packed);
  }

  // Lists the rows of the chunk of `count` steps that begins with the nth.
  void number_rows(int d, int64_t nth, int64_t count) {
    Direction& dir = direction_[d];
    const SequenceSubset all(layout_, 0, 1);
    int64_t row = 0, alive = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t t = time(d, nth + k);
      alive = all.alive(t, alive);
      dir.first[k] = row;
      for (int64_t j = 0; j < alive; ++j, ++row)
        dir.rows[row] = {t, all.sequence(j), d == 0 ? t == 0 : t == all.length(j) - 1};
    }
    dir.first[count] = row;
  }

  struct Walk;  // backward_rows.h

  // backward_products.h
  void chunk_products(const Member& team, int worker, int d, int64_t steps, bool first);
  void input_gradient(const Member& team, int worker, int d, int64_t rows);
  void column_sums(const Member& team, int d, int64_t rows, bool first) const;
  void store_weight_grads(const Member& team, int d) const;

  const BackwardParams& p_;
  const Variant& v_;
  const Gains<void*>* gain_grads_;
  const LayerShape& s_;
  const Plan& plan_;
  const SequenceLayout& layout_;
  const int64_t G_, chunk_, chunk_rows_, ld_gates_, ld_unit_, ld_operand_;
  const PanelShape hh_, ih_;
  const bool fresh_;  // weight panels are packed on the fly: with at most one step, packing all of them does not pay
  const Record record_;
  Direction direction_[2] = {};
  C *block_[kMaxMembers] = {}, *panel_[kMaxMembers] = {};
};

DLK_ISA_END
