// Backward pass of one recurrent layer.
//
// The time steps are processed in the opposite order of the forward. Each tile of a step computes
// dh = dgates(next) W_hh for a few units, and the cell's backward follows at once and writes
// the gate gradients of these units. A buffer holds the gate gradients of a chunk of steps.
// GEMMs over the chunk then compute dx and accumulate the weight gradients, so that no
// gradient tensor of the full length is allocated. The first step of a chunk reads the gate
// gradients of the last step of the previous chunk, so the buffer has room for one step more:
// the steps of even chunks lie at its start, those of odd chunks at its end.
//
// The threads are split as in the forward; all threads of a direction share the GEMMs of a chunk.
// No sum depends on the number of threads.
#pragma once

#include "core/scratch.h"
#include "core/team.h"
#include "gemm/gemm.h"
#include "rnn/cpu/record.h"
#include "rnn/cpu/sequence_layout.h"
#include "rnn/cpu/states.h"
#include "rnn/params.h"

DLK_ISA_BEGIN

template <class C, class Cell>
class Backward {
  using V = Vec<C>;
  static constexpr int kSlots = Cell::kGateGrads;
  static constexpr int64_t kBiasRows = 16;  // rows in a partial sum of bias gradients, to keep rounding errors small

 public:
  Backward(const BackwardParams& params, const Plan& plan, const SequenceLayout& layout)
      : p_(params),
        s_(params.shape),
        plan_(plan),
        layout_(layout),
        O_(s_.outputs()),
        G_(Cell::kGates * s_.H),
        chunk_(std::max<int64_t>(1, std::min(plan.chunk_steps, layout.steps()))),
        chunk_rows_(chunk_ * s_.B),
        buffer_rows_(chunk_rows_ + s_.B),
        ld_gates_(block_ld<C>(kSlots * s_.H)),
        slot_(item_count(s_.H) * kItemValues),
        ld_operand_(kPairs ? operand_ld<C>(kSlots * slot_) : ld_gates_),
        ld_unit_(block_ld<C>(s_.H)),
        ld_proj_(s_.P ? operand_ld<C>(s_.P) : 0),
        hh_(PanelShape::plain(s_.H, O_, V::size, Cell::kGates)),
        ih_(PanelShape::plain(s_.H, s_.I, V::size, Cell::kGates)),
        hr_(PanelShape::plain(s_.P, s_.H, V::size)),
        fresh_(layout.steps() <= 1),
        record_(s_) {}

  void carve(Scratch& scratch) {
    const bool weights = wants_weights();
    zeros_ = scratch.take<C>(zero_count());
    for (int d = 0; d < s_.D; ++d) {
      Direction& dir = direction_[d];
      dir.hh = scratch.take<C>(fresh_ ? 0 : hh_.elements());
      dir.ih = scratch.take<C>(fresh_ || !p_.dx.data ? 0 : ih_.elements());
      dir.hr = scratch.take<C>(fresh_ ? 0 : hr_.elements());
      dir.gates = scratch.take<C>(keeps_gates() ? buffer_rows_ * ld_gates_ : 0);
      dir.rounded = scratch.take<Operand<C>>(kPairs ? (buffer_rows_ + spare_rows()) * ld_operand_ : 0);
      dir.proj = scratch.take<C>(buffer_rows_ * ld_proj_);
      dir.rounded_proj = scratch.take<Operand<C>>(kPairs ? (buffer_rows_ + spare_rows()) * ld_proj_ : 0);
      dir.cell_out = s_.P ? scratch.take<C>(chunk_rows_ * ld_unit_) : nullptr;
      dir.carry = Cell::kCellState || Cell::kDirectPath ? scratch.take<C>(s_.B * ld_unit_) : nullptr;
      dir.rows = scratch.take<Row>(chunk_rows_);
      dir.first = scratch.take<int64_t>(chunk_);
      // The right-hand sides of the weight-gradient GEMMs, as panels: x, h and the cell's output.
      const auto columns = [&](int64_t n) {
        return weights ? item_count(chunk_rows_) * ((n + V::size - 1) / V::size * V::size) : 0;
      };
      dir.x_panels = scratch.take<C>(columns(s_.I));
      dir.h_panels = scratch.take<C>(columns(O_));
      dir.out_panels = scratch.take<C>(s_.P ? columns(s_.H) : 0);
      const auto sum = [&](void* out, int64_t n) {
        return is_compute_type<C>(p_.weights[d].dtype) ? static_cast<C*>(out) : scratch.take<C>(weights ? n : 0);
      };
      dir.dw_ih = sum(p_.grads[d].w_ih, G_ * s_.I);
      dir.dw_hh = sum(p_.grads[d].w_hh, G_ * O_);
      dir.dw_hr = sum(p_.grads[d].w_hr, s_.P * s_.H);
      dir.dbias = scratch.take<C>(weights ? block_ld<C>(kSlots * s_.H) : 0);
      dir.dx = d == 1 && p_.dx.data ? scratch.take<C>(s_.rows * s_.I) : nullptr;
    }
    for (int m = 0; m < plan_.threads; ++m) {
      block_[m] = scratch.take<C>(kTransposedRows * block_ld<C>(item_count(chunk_rows_)));
      panel_[m] = scratch.take<C>(fresh_ ? std::max({hh_.largest(), ih_.largest(), hr_.largest()}) : 0);
    }
  }

  // Called once, before the threads start.
  void begin() { std::fill_n(zeros_, zero_count(), C(0)); }

  void run(const Member& team, int worker, int d) {
    const Bf16Unit::Session session;
    prepare(team, d);
    const bool by_rows = plan_.split == Plan::rows;
    Walk walk{*this,
              direction_[d],
              by_rows ? Member{0, 1, nullptr} : team,
              by_rows ? SequenceSubset(layout_, team.rank, team.size) : SequenceSubset(layout_, 0, 1),
              panel_[worker],
              d};
    walk.begin();
    team.sync();
    const int64_t steps = layout_.steps();
    for (int64_t nth = 0; nth < steps; nth += chunk_) {
      const int64_t count = std::min(chunk_, steps - nth), parity = nth / chunk_ & 1;
      if (team.rank == 0) number_rows(d, nth, count, parity);
      team.sync();
      for (int64_t k = 0; k < count; ++k) {
        walk.step(nth + k, k, parity);
        // The second step may overwrite what the first step of another thread still reads.
        if (k + 1 < count) (k == 0 ? team : walk.member).sync();
      }
      team.sync();
      chunk_products(team, worker, d, parity, nth == 0);
      team.sync();
    }
    walk.finish();
    team.sync();
    store_weight_grads(team, d);
  }

  // Called after all directions: adds the second direction's dx to the first's, and writes zeros to padding rows.
  void finish(const Member& team) const {
    if ((!p_.dx.data && !p_.gate_grads) || (s_.D == 1 && layout_.uniform())) return;
    int64_t begin, end;
    team.share(s_.B, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = layout_.sequence(i), length = layout_.length(i);
      for (int64_t t = 0; t < length && s_.D == 2 && p_.dx.data; ++t) {
        const int64_t at = layout_.at(p_.dx, t, b);
        const C* other = direction_[1].dx + layout_.row(t, b) * s_.I;
        for (int64_t j = 0; j < s_.I; j += V::size) {
          const int n = static_cast<int>(std::min<int64_t>(V::size, s_.I - j));
          store_any<C>(p_.dx.dtype, p_.dx.data, at + j,
                       load_any<C>(p_.dx.dtype, p_.dx.data, at + j, n) + V::load(other + j, n), n);
        }
      }
      if (layout_.packed()) continue;
      for (int64_t t = length; t < s_.T; ++t) {
        if (p_.dx.data)
          std::memset(advance(p_.dx.data, p_.dx.dtype, layout_.at(p_.dx, t, b)), 0, s_.I * item_size(p_.dx.dtype));
        for (int d = 0; d < s_.D; ++d) {
          const int64_t row = d * s_.rows + layout_.row(t, b);
          if (p_.gate_grads) std::fill_n(static_cast<C*>(p_.gate_grads) + row * kSlots * s_.H, kSlots * s_.H, C(0));
          if (p_.proj_grads) std::fill_n(static_cast<C*>(p_.proj_grads) + row * s_.P, s_.P, C(0));
        }
      }
    }
  }

 private:
  struct Row {
    int64_t t, b;  // time step and sequence
    bool first;    // this is the sequence's first step: the state before it is h0, c0
    bool reset;    // the state before the step is zero
  };

  struct Direction {
    C *hh, *ih, *hr;                      // panels of the weights
    C *gates, *proj;                      // gradients of a chunk's gates and of its projected h
    Operand<C>*rounded, *rounded_proj;    // these, rounded to the operands of the products (kPairs only)
    C* cell_out;                          // o * tanh(c') of a chunk, for dw_hr
    C* carry;                             // lstm: dc; gru: the part of dh that bypasses the gates
    Row* rows;                            // the rows of the chunk
    int64_t* first;                       // first row of each step of the chunk
    int64_t row_count;                    // number of rows in the chunk
    C *x_panels, *h_panels, *out_panels;  // see carve()
    C *dw_ih, *dw_hh, *dw_hr, *dbias;     // gradients accumulated so far
    C* dx;                                // the second direction's part of dx
  };

  int64_t zero_count() const { return ld_operand_; }
  // If the batch is split, the rows of a thread's tile lie as many rows apart as there are threads (SequenceSubset).
  int64_t spare_rows() const {
    if (plan_.split != Plan::rows) return kSpareRows;
    return kSpareRows * (plan_.directions_side_by_side ? (plan_.threads + 1) / 2 : plan_.threads);
  }
  // With pairs, products and bias gradients take the rounded gate gradients. The others are for gate_grads only.
  bool keeps_gates() const { return !kPairs || p_.gate_grads; }
  bool wants_weights() const { return p_.grads[0].w_ih != nullptr; }
  // Time of the nth step in the order of the backward.
  int64_t time(int d, int64_t nth) const { return d == 0 ? layout_.steps() - 1 - nth : nth; }
  // Time of the step before t in the order of the forward.
  int64_t past(int d, int64_t t) const { return d == 0 ? t - 1 : t + 1; }
  // The first row of the current chunk in the buffers.
  int64_t buffer_row(int d, int64_t parity) const { return parity ? buffer_rows_ - direction_[d].row_count : 0; }
  C* gates(int d, int64_t parity) const { return direction_[d].gates + buffer_row(d, parity) * ld_gates_; }
  Operand<C>* rounded(int d, int64_t parity) const {
    return direction_[d].rounded + buffer_row(d, parity) * ld_operand_;
  }
  // Gate gradients as operands of products, in rows of ld_operand_ values with slots of slot_ values: operand() as
  // items (tile.h), for products that sum over the gates, operand_values() as single values.
  const C* operand(int d, int64_t parity) const { return items_of<C>(operand_values(d, parity)); }
  const Operand<C>* operand_values(int d, int64_t parity) const {
    if constexpr (kPairs) {
      return rounded(d, parity);
    } else {
      return gates(d, parity);
    }
  }
  C* proj(int d, int64_t parity) const { return direction_[d].proj + buffer_row(d, parity) * ld_proj_; }
  Operand<C>* proj_operands(int d, int64_t parity) const {
    if constexpr (kPairs) {
      return direction_[d].rounded_proj + buffer_row(d, parity) * ld_proj_;
    } else {
      return proj(d, parity);
    }
  }

  void prepare(const Member& team, int d) const {
    const Direction& dir = direction_[d];
    const DirectionWeights& w = p_.weights[d];
    const auto pack = [&](const PanelShape& shape, const void* weights, C* panels) {
      int64_t begin, end;
      team.share(shape.count(), 1, &begin, &end);
      for (int64_t p = begin; p < end; ++p) pack_panel_matrix<C>(shape, p, w.dtype, weights, panels + shape.offset(p));
    };
    if (!fresh_) {
      pack(hh_, w.w_hh, dir.hh);
      if (p_.dx.data) pack(ih_, w.w_ih, dir.ih);
      if (s_.P) pack(hr_, w.w_hr, dir.hr);
    }
    if constexpr (kPairs) {  // operands are 0 from the last unit of a slot on
      int64_t begin, end;
      team.share(slot_ > s_.H || s_.P ? buffer_rows_ : 0, 1, &begin, &end);
      for (int64_t row = begin; row < end; ++row) {
        for (int k = 0; k < kSlots; ++k)
          std::fill_n(dir.rounded + row * ld_operand_ + k * slot_ + s_.H, slot_ - s_.H, Operand<C>{});
        if (s_.P) std::fill_n(dir.rounded_proj + row * ld_proj_ + s_.P, ld_proj_ - s_.P, Operand<C>{});
      }
    }
    if (!wants_weights() || layout_.steps() > 0) return;  // if there are steps, the first chunk overwrites the sums
    const auto clear = [&](C* sum, int64_t n) {
      int64_t begin, end;
      team.share(n, 1024, &begin, &end);
      std::fill(sum + begin, sum + end, C(0));
    };
    clear(dir.dw_ih, G_ * s_.I);
    clear(dir.dw_hh, G_ * O_);
    clear(dir.dw_hr, s_.P * s_.H);
    clear(dir.dbias, kSlots * s_.H);
  }

  Panels<C> panels(const PanelShape& shape, const C* packed, int d, const void* weights, C* buffer) const {
    if (fresh_) return Panels<C>(shape, pack_panel_matrix<C>, p_.weights[d].dtype, weights, buffer);
    return Panels<C>(shape, packed);
  }

  // Lists the rows of the chunk of `count` steps that begins with the nth. The steps of an odd chunk are in falling
  // order.
  void number_rows(int d, int64_t nth, int64_t count, int64_t parity) {
    Direction& dir = direction_[d];
    const SequenceSubset all(layout_, 0, 1);
    int64_t row = 0, alive = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = parity ? count - 1 - i : i, t = time(d, nth + k);
      alive = all.alive(t, alive);
      dir.first[k] = row;
      for (int64_t j = 0; j < alive; ++j, ++row)
        dir.rows[row] = {t, all.sequence(j), d == 0 ? t == 0 : t == all.length(j) - 1, all.is_reset(d, t, j)};
    }
    dir.row_count = row;
  }

  struct Walk;  // backward_walk.h

  // backward_products.h
  void chunk_products(const Member& team, int worker, int d, int64_t parity, bool first);
  const void* x_row(const Row& row) const;
  const C* saved_record(int d, int64_t t, int64_t b) const {
    return static_cast<const C*>(p_.saved) + (d * s_.rows + layout_.row(t, b)) * record_.size;
  }
  V past_h(int d, const Row& row, int64_t j, int n) const;
  void copy_gate_grads(const Member& team, int d, int64_t parity, int64_t rows) const;
  void store_weight_grads(const Member& team, int d) const;

  const BackwardParams& p_;
  const LayerShape& s_;
  const Plan& plan_;
  const SequenceLayout& layout_;
  const int64_t O_, G_, chunk_, chunk_rows_, buffer_rows_, ld_gates_, slot_, ld_operand_, ld_unit_, ld_proj_;
  const PanelShape hh_, ih_, hr_;
  C* zeros_ = nullptr;
  Direction direction_[2] = {};
  const bool fresh_;  // weight panels are packed on the fly: with at most one step, packing all of them does not pay
  const Record<C, Cell> record_;
  C *block_[kMaxMembers] = {}, *panel_[kMaxMembers] = {};
};

DLK_ISA_END
