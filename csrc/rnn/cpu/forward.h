// Forward pass of one recurrent layer.
//
// Time is processed in chunks of steps. For each chunk one GEMM computes the input products
// of all its rows; then every step multiplies the last h with W_hh tile by tile and applies
// the cell equation to each tile at once. The rows of a chunk are numbered in the order of
// processing; tables give the place of each in x, y and the products. With plan.chunk_steps 0
// there are no chunks: the tile of a step accumulates the products of x and of h.
//
// The threads split either the batch (each processes its own sequences, with no barrier at a step)
// or the hidden units (each keeps its panels of W_hh in its own cache; one barrier per step).
//
// When activations are saved, the input products of a chunk are written to the place of the
// activations, if they fit, and the cell equation overwrites them. Otherwise they are stored
// in the order in which the cells read them: [block of Vec::size units][row][gate][lane].
// c is stored as [block][row][lane].
#pragma once

#include "core/scratch.h"
#include "core/team.h"
#include "gemm/dot.h"
#include "gemm/gemm.h"
#include "rnn/cpu/record.h"
#include "rnn/cpu/sequence_layout.h"
#include "rnn/cpu/states.h"
#include "rnn/cpu/weights.h"
#include "rnn/params.h"

DLK_ISA_BEGIN

template <class C, class Cell>
class Forward {
  using V = Vec<C>;
  static constexpr int kTogether = kRegisters >= 32 ? 2 : 1;  // vectors of units that pass the cell at once
  static constexpr int kOwnRows = 8;  // with so few rows each thread makes quads of h itself, to save a barrier a step
  static constexpr bool kKeepsH = !kPairs || Cell::kDirectPath;  // keeps h unrounded, not only for the products

 public:
  Forward(const ForwardParams& params, const Plan& plan, const SequenceLayout& layout)
      : p_(params),
        s_(params.shape),
        plan_(plan),
        layout_(layout),
        fresh_(plan.recurrence == Plan::tiles && !params.packed && layout.steps() <= 1),
        weights_(s_, V::size, plan.recurrence == Plan::tiles && !fresh_),
        O_(s_.outputs()),
        chunk_(std::max<int64_t>(1, std::min(plan.chunk_steps, layout.steps()))),
        // When the batch is split, every thread has slots for ceil(B / threads) sequences.
        chunk_rows_(chunk_ * (s_.B + (plan.split == Plan::rows ? plan.threads : 0))),
        ld_h_(operand_ld<C>(O_)),
        ld_cell_(operand_ld<C>(s_.H)),
        blocks_((s_.H + V::size - 1) / V::size),
        record_(s_),
        in_place_(params.saved && !record_.narrow),
        fused_(!Cell::kHasPartedGate && !fresh_ && plan.chunk_steps == 0) {}

  void carve(Scratch& scratch) {
    const int64_t rows = slots();
    for (int d = 0; d < s_.D; ++d) {
      weight_memory_[d] = p_.packed ? nullptr : scratch.take<C>(weights_.total);
      products_[d] = in_place_ || fused_ ? nullptr : scratch.take<C>(blocks_ * chunk_rows_ * Cell::kGates * V::size);
      h_[d] = scratch.take<C>(kKeepsH ? 2 * rows * ld_h_ : 0);
      rounded_[d] = scratch.take<Operand<C>>(kItemValues > 1 ? ((kPairs ? 2 : 1) * rows + kSpareRows) * ld_h_ : 0);
      h_scales_[d] = scratch.take<C>(kQuads ? rows : 0);
      c_[d] = Cell::kCellState ? scratch.take<C>(blocks_ * rows * V::size) : nullptr;
      cell_out_[d] = s_.P ? scratch.take<Operand<C>>((rows + kSpareRows) * ld_cell_) : nullptr;
      x_rows_[d] = scratch.take<C>(copies_x() && fused_ ? (rows + kSpareRows) * block_ld<C>(weights_.ih.K) : 0);
    }
    for (int m = 0; m < plan_.threads; ++m) {
      tables_[m].x = scratch.take<const void*>(chunk_rows_);
      tables_[m].saved = scratch.take<C*>(p_.saved ? chunk_rows_ : 0);
      tables_[m].y = scratch.take<int64_t>(chunk_rows_);
      tables_[m].first = scratch.take<int64_t>(chunk_ + 1);
      tables_[m].block = scratch.take<C>(copies_x() && !fused_ ? kBlockRows * block_ld<C>(weights_.ih.K) : 0);
      tables_[m].x_scales = scratch.take<C>(kQuads ? chunk_rows_ : 0);
      tables_[m].own_h = scratch.take<Operand<C>>(kQuads ? (kOwnRows + kSpareRows) * ld_h_ : 0);
      tables_[m].panel =
          scratch.take<C>(fresh_ ? std::max({weights_.ih.largest(), weights_.hh.largest(), weights_.hr.largest()}) : 0);
    }
  }

  void set_packed(const C* panels) {
    for (int d = 0; d < s_.D; ++d) weight_memory_[d] = const_cast<C*>(panels) + d * weights_.total;
  }

  // Runs direction d with the threads of `team`; `worker` is this thread's number among those of all directions.
  void run(const Member& team, int worker, int d) {
    const Bf16Unit::Session session;
    if (!p_.packed) {
      pack_weights<C, Cell>(team, s_, p_.weights[d], weights_, weight_memory_[d]);
      team.sync();
    }
    const bool by_rows = plan_.split == Plan::rows;
    Walk walk{*this,
              by_rows ? Member{0, 1, nullptr} : team,
              by_rows ? SequenceSubset(layout_, team.rank, team.size) : SequenceSubset(layout_, 0, 1),
              tables_[worker],
              d,
              by_rows ? team.rank * ((s_.B + team.size - 1) / team.size) : 0};
    walk.go();
  }

  // Writes zeros to the padding rows of y and cells.
  void finish(const Member& team) const {
    if (layout_.uniform() || layout_.packed()) return;
    int64_t begin, end;
    team.share(s_.B, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      clear_padding(p_.y, O_, i);
      clear_padding(p_.cells, s_.H, i);
    }
  }

 private:
  void clear_padding(const RowTensor<void*>& rows, int64_t features, int64_t i) const {
    for (int64_t t = layout_.length(i); t < s_.T && rows.data; ++t)
      std::memset(advance(rows.data, rows.dtype, layout_.at(rows, t, layout_.sequence(i))), 0,
                  s_.D * features * item_size(rows.dtype));
  }

  struct Tables {
    const void** x;     // address of each row
    C** saved;          // record of each row: first holds the products, then the activations
    int64_t* y;         // element offset of each row
    int64_t* first;     // first row of each step of the chunk, and the end
    C* block;           // copies of rows of x, for the input GEMM
    C* panel;           // a weight panel packed on the fly
    C* x_scales;        // of each row (kQuads only)
    Operand<C>* own_h;  // h of a step with few rows, as quads
    C own_scales[kOwnRows];
  };

  // Rows of x are copied if they must be converted, if their stride would put the rows of a tile into the same set of
  // the cache, if pairs of bf16 are not whole or not aligned to the size of the float that they are loaded as, and for
  // a matrix unit, which wants rows with equal distances, filled up with zeros.
  bool copies_x() const {
    const int64_t stride = layout_.packed() ? p_.x.t : p_.x.b;
    if (kTiles || kQuads) return true;
    if (kPairs && (s_.I % 2 || stride % 2 || p_.x.t % 2 || reinterpret_cast<uintptr_t>(p_.x.data) % sizeof(C)))
      return true;
    return !is_operand_type<C>(p_.x.dtype) || collides<C>(stride / kItemValues);
  }
  int64_t slots() const { return s_.B + plan_.threads; }
  Panels<C> panels(const PanelShape& shape, int64_t at, const void* weights, int d, const Tables& table) const {
    if constexpr (kWeights == Weights::given) {
      if (fresh_) return Panels<C>(shape, pack_panel_transposed<C>, p_.weights[d].dtype, weights, table.panel);
    }
    return Panels<C>(shape, stored_panels<C>(weight_memory_[d] + at));
  }

  struct Walk;  // forward_walk.h

  const ForwardParams& p_;
  const LayerShape& s_;
  const Plan& plan_;
  const SequenceLayout& layout_;
  const bool fresh_;  // weight panels are packed on the fly: with at most one step, packing all of them does not pay
  const WeightLayout weights_;
  const int64_t O_, chunk_, chunk_rows_, ld_h_, ld_cell_, blocks_;
  const Record<C, Cell> record_;
  const bool in_place_, fused_;
  C *weight_memory_[2] = {}, *products_[2] = {}, *h_[2] = {}, *c_[2] = {};
  Operand<C>* cell_out_[2] = {};  // what is projected
  C* x_rows_[2] = {};             // copies of a step's rows of x, if fused_ and copies_x()
  Operand<C>* rounded_[2] = {};   // h rounded to the operands of the products, with kQuads only that of one step
  C* h_scales_[2] = {};           // the scales of those rows (kQuads only)
  Tables tables_[kMaxMembers];
};

DLK_ISA_END
