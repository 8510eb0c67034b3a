// Forward pass of one layer with layer normalisation, zoneout or recurrent dropout.
//
// The plain forward (rnn/cpu/forward.h) applies the cell to each tile of units as soon as its product is there. Here a
// row needs all of its products first, because layer normalisation takes their mean and variance. So a step has two
// parts, with a barrier after each if threads share the step: the products of h with W_hh go to a buffer, then the
// threads share the rows, each of which is normalised and goes through the cell while it is in the cache
// (forward_rows.h). The products of x are made for a chunk of steps at a time, as in the plain forward, whose splits
// among threads are the same too.
#pragma once

#include "core/scratch.h"
#include "core/team.h"
#include "gemm/gemm.h"
#include "rnn/cpu/sequence_layout.h"
#include "rnn/cpu/states.h"
#include "rnn/cpu/variants/moments.h"

DLK_ISA_BEGIN

// The parameters of a direction that are added or multiplied, in the compute type. They have room for whole vectors.
template <class C>
struct VariantConstants {
  C *b_ih, *b_hh, *g_ih, *g_hh, *g_c, *b_c;

  void carve(Scratch& scratch, int64_t gate_values, int64_t H, bool normalised) {
    const int64_t gates = block_ld<C>(gate_values), units = normalised ? block_ld<C>(H) : 0;
    b_ih = scratch.take<C>(gates);
    b_hh = scratch.take<C>(gates);
    g_ih = scratch.take<C>(normalised ? gates : 0);
    g_hh = scratch.take<C>(normalised ? gates : 0);
    g_c = scratch.take<C>(units);
    b_c = scratch.take<C>(units);
  }

  void fill(const DirectionWeights& w, const Gains<const void*>& gains, int64_t gate_values, int64_t H) const {
    load(w.dtype, w.b_ih, gate_values, b_ih);
    load(w.dtype, w.b_hh, gate_values, b_hh);
    if (!g_ih) return;
    load(gains.dtype, gains.ih, gate_values, g_ih);
    load(gains.dtype, gains.hh, gate_values, g_hh);
    load(gains.dtype, gains.c, H, g_c);
    load(gains.dtype, gains.c_bias, H, b_c);
  }

 private:
  static void load(DType dtype, const void* from, int64_t n, C* to) {
    if (from) {
      load_row<C>(dtype, from, n, to);
    } else {
      std::fill_n(to, n, C(0));
    }
  }
};

template <class C, class Cell>
class VariantForward {
  using V = Vec<C>;
  static_assert(!kTiles, "operands have no spare rows");

 public:
  VariantForward(const VariantForwardParams& params, const Plan& plan, const SequenceLayout& layout)
      : p_(params.layer),
        v_(params.variant),
        s_(params.layer.shape),
        plan_(plan),
        layout_(layout),
        G_(Cell::kGates * s_.H),
        chunk_(std::max<int64_t>(1, std::min(plan.chunk_steps, layout.steps()))),
        // When the batch is split, every thread has slots for ceil(B / threads) sequences.
        slots_(s_.B + plan.threads),
        ld_gates_(block_ld<C>(G_)),
        ld_unit_(block_ld<C>(s_.H)),
        ld_operand_(operand_ld<C>(s_.H)),
        ih_(PanelShape::plain(s_.I, G_, V::size)),
        hh_(PanelShape::plain(s_.H, G_, V::size)),
        fresh_(layout.steps() <= 1),
        record_(s_.H, v_.normalised) {}

  void carve(Scratch& scratch) {
    for (int d = 0; d < s_.D; ++d) {
      Direction& dir = direction_[d];
      dir.constants.carve(scratch, G_, s_.H, v_.normalised);
      dir.ih = scratch.take<C>(fresh_ ? 0 : std::max<int64_t>(1, ih_.elements()));  // not null without inputs
      dir.hh = scratch.take<C>(fresh_ ? 0 : hh_.elements());
      dir.input = scratch.take<C>(chunk_ * slots_ * ld_gates_);
      dir.hidden = scratch.take<C>(slots_ * ld_gates_);
      dir.h = scratch.take<C>(slots_ * ld_unit_);
      dir.operands = scratch.take<Operand<C>>(keeps_operands() ? slots_ * ld_operand_ : 0);
      dir.c = scratch.take<C>(Cell::kCellState ? slots_ * ld_unit_ : 0);
    }
    for (int m = 0; m < plan_.threads; ++m) {
      Own& own = own_[m];
      own.x = scratch.take<const void*>(chunk_ * slots_);
      own.first = scratch.take<int64_t>(chunk_ + 1);
      own.block = scratch.take<C>(copies_x() ? kBlockRows * block_ld<C>(ih_.K) : 0);
      own.panel = scratch.take<C>(fresh_ ? std::max(ih_.largest(), hh_.largest()) : 0);
      own.c = scratch.take<C>(ld_unit_);
      own.o = scratch.take<C>(ld_unit_);
    }
  }

  // Runs direction d with the threads of `team`; `worker` is this thread's number among those of all directions.
  void run(const Member& team, int worker, int d) {
    prepare(team, d);
    team.sync();
    const bool by_rows = plan_.split == Plan::rows;
    Walk walk{*this,
              direction_[d],
              by_rows ? Member{0, 1, nullptr} : team,
              by_rows ? SequenceSubset(layout_, team.rank, team.size) : SequenceSubset(layout_, 0, 1),
              own_[worker],
              d,
              by_rows ? team.rank * ((s_.B + team.size - 1) / team.size) : 0};
    walk.go();
  }

  // Writes zeros to the padding rows of y.
  void finish(const Member& team) const {
    if (layout_.uniform() || layout_.packed()) return;
    int64_t begin, end;
    team.share(s_.B, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t t = layout_.length(i); t < s_.T; ++t)
        std::memset(advance(p_.y.data, p_.y.dtype, layout_.at(p_.y, t, layout_.sequence(i))), 0,
                    s_.D * s_.H * item_size(p_.y.dtype));
  }

 private:
  struct Direction {
    VariantConstants<C> constants;
    C *ih, *hh;            // panels of the weights
    C *input, *hidden;     // products of x for a chunk of steps, of h for a step
    C *h, *c;              // the states
    Operand<C>* operands;  // h as W_hh sees it, if keeps_operands()
  };
  struct Own {       // of one thread
    const void** x;  // address of each row of the chunk
    int64_t* first;  // first row of each step of the chunk, and the end
    C* block;        // copies of rows of x
    C* panel;        // a weight panel packed on the fly
    C *c, *o;        // c' and o of a row, until c' is normalised
  };

  // For the reasons of Forward::copies_x.
  bool copies_x() const {
    const int64_t stride = layout_.packed() ? p_.x.t : p_.x.b;
    if (kPairs && (s_.I % 2 || stride % 2 || p_.x.t % 2 || reinterpret_cast<uintptr_t>(p_.x.data) % sizeof(C)))
      return true;
    return !is_operand_type<C>(p_.x.dtype) || collides<C>(stride / kItemValues);
  }
  // Whether the products with W_hh take something else than h: rounded values, or those that recurrent dropout leaves.
  bool keeps_operands() const { return kPairs || v_.dropout; }

  void prepare(const Member& team, int d) const {
    const Direction& dir = direction_[d];
    const DirectionWeights& w = p_.weights[d];
    if (team.rank == 0) dir.constants.fill(w, v_.gains[d], G_, s_.H);
    const auto pack = [&](const PanelShape& shape, const void* weights, C* panels) {
      int64_t begin, end;
      team.share(shape.count(), 1, &begin, &end);
      for (int64_t p = begin; p < end; ++p)
        pack_panel_transposed<C>(shape, p, w.dtype, weights, panels + shape.offset(p));
    };
    if (fresh_) return;
    pack(ih_, w.w_ih, dir.ih);
    pack(hh_, w.w_hh, dir.hh);
  }

  Panels<C> panels(const PanelShape& shape, const C* packed, DType dtype, const void* weights, C* buffer) const {
    return fresh_ ? Panels<C>(shape, pack_panel_transposed<C>, dtype, weights, buffer) : Panels<C>(shape, packed);
  }

  struct Walk;  // forward_rows.h

  const ForwardParams& p_;
  const Variant& v_;
  const LayerShape& s_;
  const Plan& plan_;
  const SequenceLayout& layout_;
  const int64_t G_, chunk_, slots_, ld_gates_, ld_unit_, ld_operand_;
  const PanelShape ih_, hh_;
  const bool fresh_;  // weight panels are packed on the fly: with at most one step, packing all of them does not pay
  const VariantRecord<Cell> record_;
  Direction direction_[2] = {};
  Own own_[kMaxMembers] = {};
};

DLK_ISA_END
