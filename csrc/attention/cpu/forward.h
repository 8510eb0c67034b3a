// The forward of attention. A task has a block of query rows and goes through its keys block by block, and
// through all panels of rows for each of these. If the keys are split, the task that ends last adds up the
// parts, in order.
#pragma once

#include "attention/cpu/dot.h"

DLK_ISA_BEGIN

template <class C>
class AttentionForward {
 public:
  using V = Vec<C>;

  AttentionForward(const AttentionForwardParams& params, const AttentionPlan& plan, const AttentionTasks& tasks)
      : p_(params),
        in_(params.in),
        s_(params.in.shape),
        plan_(plan),
        tasks_(tasks),
        scores_(params.in),
        dropout_(params.in),
        dot_(plan.kernel == AttentionPlan::dot) {}

  void carve(Scratch& scratch) {
    const int64_t lanes = Lanes<C>::lanes_for(plan_.block_m);
    for (int n = 0; n < plan_.threads; ++n) {
      Worker& w = workers_[n];
      w.lanes.carve(scratch, plan_.block_m);
      w.q = scratch.take<C>(kPacked ? 0 : lanes * lanes_rounded<C>(s_.D));
      w.state = scratch.take<C>(plan_.splits == 1 ? State::elements(lanes, s_.Dv) : 0);
      w.scores = scratch.take<C>(plan_.block_n * Lanes<C>::kWidth);
      w.bias = scratch.take<C>(in_.mask.data ? (plan_.block_n + V::size) * Lanes<C>::kWidth : 0);
      w.k = scratch.take<C>(dot_ || kPacked ? 0 : plan_.block_n * lanes_rounded<C>(s_.D));
      w.v = scratch.take<C>(plan_.block_n * lanes_rounded<C>(s_.Dv));
      w.words = scratch.take<uint32_t>(dropout_.active ? 4 * (Lanes<C>::kWidth + Words::size) : 0);
      if constexpr (kPacked) w.packed.carve(scratch, s_, lanes, plan_.block_n);
    }
    if (plan_.splits > 1) {
      parts_ = scratch.take<C>(tasks_.blocks * plan_.splits * State::elements(lanes, s_.Dv));
      arrived_ = scratch.take<std::atomic<int64_t>>(tasks_.blocks);
    }
  }

  void begin() {
    for (int64_t i = 0; arrived_ && i < tasks_.blocks; ++i) new (&arrived_[i]) std::atomic<int64_t>(0);
  }

  void run(int worker, int64_t index) {
    const AttentionTask& task = tasks_.tasks[static_cast<size_t>(index)];
    Worker& w = workers_[worker];
    w.lanes.set(in_, task.b, task.kv_head, task.row, task.rows);
    const State state = state_of(w, task, task.split);
    state.begin(w.lanes, task.split == 0 ? in_.sinks : nullptr, scores_);
    walk(w, task, state);
    if (plan_.splits == 1) return finish(w, state);
    if (arrived_[task.block].fetch_add(1, std::memory_order_acq_rel) + 1 < plan_.splits) return;
    const State whole = state_of(w, task, 0);
    for (int64_t split = 1; split < plan_.splits; ++split) whole.add(w.lanes, state_of(w, task, split));
    finish(w, whole);
  }

 private:
  using State = RowState<C>;
  static constexpr bool kPacked = Bf16Unit::kPresent;

  struct Worker {
    Lanes<C> lanes;
    C* q;      // panels [D][lanes], or rows for dot products
    C* state;  // memory of the rows' state
    C *scores, *bias, *k, *v;
    uint32_t* words;
    PackedForward<C, Bf16Unit> packed;
  };

  const AttentionForwardParams& p_;
  const AttentionInputs& in_;
  const AttentionShape& s_;
  const AttentionPlan& plan_;
  const AttentionTasks& tasks_;
  Scores<C> scores_;
  Dropout dropout_;
  Worker workers_[kMaxMembers];
  bool dot_;
  C* parts_ = nullptr;  // states, [block][split]
  std::atomic<int64_t>* arrived_ = nullptr;

  State state_of(const Worker& w, const AttentionTask& task, int64_t split) const {
    const int64_t lanes = Lanes<C>::lanes_for(plan_.block_m);
    C* memory =
        plan_.splits == 1 ? w.state : parts_ + (task.block * plan_.splits + split) * State::elements(lanes, s_.Dv);
    return State(memory, lanes, s_, dot_, scores_);
  }

  void walk(Worker& w, const AttentionTask& task, const State& state) {
    Lanes<C>& lanes = w.lanes;
    const AttentionSequence& sequence = lanes.sequence;
    int64_t begin = sequence.N, end = 0;
    for (int64_t p = 0; p < lanes.panels; ++p) {
      begin = std::min(begin, lanes.panel[p].first_begin);
      end = std::max(end, lanes.panel[p].last_end);
      if constexpr (kPacked) {
        w.packed.set_rows(lanes, lanes.panel[p], in_.q);
      } else if (!dot_) {
        rows_to_lanes(lanes, lanes.panel[p], in_.q, s_.dtype, s_.D, w.q + lanes.panel[p].lane * s_.D);
      }
    }
    for (int64_t l = 0; dot_ && l < lanes.rows; ++l)
      load_row<C>(s_.dtype, lanes.row_of(in_.q, s_.dtype, l), s_.D, w.q + l * lanes_rounded<C>(s_.D));
    if (begin >= end) return;
    const int64_t first = begin + part_begin(end - begin, plan_.block_n, plan_.splits, task.split);
    const int64_t last = begin + part_begin(end - begin, plan_.block_n, plan_.splits, task.split + 1);
    for (int64_t j = first; j < last; j += plan_.block_n) {
      const int64_t keys = std::min(plan_.block_n, last - j);
      KeyBlock block{*this, w, task, j, keys};
      for (int64_t p = 0; p < lanes.panels; ++p) step(w, lanes.panel[p], block, state);
    }
  }

  // Keys and values of a block, which are read when a panel first needs them.
  struct KeyBlock {
    const AttentionForward& parent;
    Worker& w;
    const AttentionTask& task;
    int64_t first, keys;
    KeyRows<C> k_{nullptr, 0}, v_{nullptr, 0};
    bool packed_k = false, packed_v = false;
    int finite = -1;

    const void* address(const HeadTensor<const void*>& t) const {
      return advance(t.data, parent.s_.dtype, key_offset(parent.in_, w.lanes.sequence, t, task.b, task.kv_head, first));
    }
    const KeyRows<C>& k() {
      if (!k_.data) {
        const bool in_place = rows_in_place<C>(parent.s_.dtype, parent.in_.k.row, parent.s_.D);
        k_ = read_rows<C>(parent.s_.dtype, address(parent.in_.k), parent.in_.k.row, keys, parent.s_.D, in_place, w.k);
      }
      return k_;
    }
    const KeyRows<C>& v() {
      if (!v_.data) {
        // With few rows values are read as whole vectors, and too rarely for their stride to matter.
        const bool in_place = parent.dot_ ? is_compute_type<C>(parent.s_.dtype) && parent.s_.Dv % V::size == 0
                                          : rows_in_place<C>(parent.s_.dtype, parent.in_.v.row, parent.s_.Dv);
        v_ = read_rows<C>(parent.s_.dtype, address(parent.in_.v), parent.in_.v.row, keys, parent.s_.Dv, in_place, w.v);
      }
      return v_;
    }
    const PackedForward<C, Bf16Unit>& packed_keys() {
      if (!packed_k) w.packed.set_keys(address(parent.in_.k), parent.in_.k.row, keys);
      packed_k = true;
      return w.packed;
    }
    const PackedForward<C, Bf16Unit>& packed_values() {
      if (!packed_v) w.packed.set_values(address(parent.in_.v), parent.in_.v.row, keys);
      packed_v = true;
      return w.packed;
    }
    bool values_finite() {
      if (finite < 0) finite = all_finite(v().data, v().ld, keys, parent.s_.Dv);
      return finite;
    }
  };

  void step(Worker& w, const LanePanel& panel, KeyBlock& block, const State& state) {
    ScoreTile<C> tile;
    tile.scores = w.scores, tile.bias = w.bias, tile.ld = int64_t{panel.vectors} * V::size;
    if (!scores_.clip(panel, block.first, block.keys, &tile) || !scores_.read_mask(w.lanes, &tile)) return;
    const int64_t ld = tile.ld, skipped = tile.first - block.first;
    const KeyRange range{skipped, tile.keys};
    if constexpr (kPacked) {
      block.packed_keys().score(panel, range, w.scores);
      tile.scores += skipped * ld;
    } else if (dot_) {
      const int64_t ldq = lanes_rounded<C>(s_.D);
      tile.clear_spare_lanes();
      dot_rows<C>(s_.dtype, panel.rows, w.q + panel.lane * ldq, ldq, s_.D,
                  advance(block.address(in_.k), s_.dtype, skipped * in_.k.row), in_.k.row, tile.keys, tile.scores, ld,
                  RowsAhead{static_cast<const char*>(advance(block.address(in_.v), s_.dtype, skipped * in_.v.row)),
                            in_.v.row * item_size(s_.dtype), s_.Dv * item_size(s_.dtype)});
    } else {
      const KeyRows<C>& k = block.k();
      multiply_rows(tile.keys, panel.vectors, k.data + skipped * k.ld, k.ld, s_.D, w.q + panel.lane * s_.D, tile.scores,
                    ld, false);
    }
    scores_.apply(w.lanes, tile, nullptr);
    state.softmax(tile);
    if (s_.Dv == 0) return;
    if (dropout_.active) drop(w, tile);
    const bool whole = !kPacked || range.fills(Bf16Unit::kDepth, block.keys);
    const bool selected = (tile.masked() || !whole) && !block.values_finite();
    if constexpr (kPacked) {
      if (!selected) return block.packed_values().add_values(panel, range, w.scores, state.of(panel));
    }
    const KeyRows<C>& v = block.v();
    add_values(tile, v.data + skipped * v.ld, v.ld, selected, state);
  }

  void add_values(const ScoreTile<C>& tile, const C* values, int64_t ldv, bool selected, const State& state) const {
    C* o = state.of(*tile.panel);
    const int64_t ld = tile.ld, keys = tile.keys, rows = tile.panel->rows;
    if (dot_ && selected) {
      add_selected<C, Lies::columns, true>(rows, s_.Dv, tile.scores, ld, keys, values, ldv, o, state.ld());
    } else if (dot_) {
      const int64_t vectors = state.ld() / V::size;
      for (int64_t strip = 0; strip < strips(vectors); ++strip) {
        const int64_t first = strip_begin(vectors, strip) * V::size;
        add_columns(rows, strip_width(vectors, strip), tile.scores, ld, keys, values + first, ldv, o + first,
                    state.ld());
      }
    } else if (selected) {
      add_selected<C, Lies::columns, false>(s_.Dv, ld, values, ldv, keys, tile.scores, ld, o, ld);
    } else {
      add_columns(s_.Dv, tile.panel->vectors, values, ldv, keys, tile.scores, ld, o, ld);
    }
  }

  void drop(Worker& w, const ScoreTile<C>& tile) const {
    drop_tile<C>(dropout_, w.lanes, tile, w.words,
                 [&](int64_t at, V kept) { (V::load(tile.scores + at) * kept).store(tile.scores + at); });
  }

  void finish(Worker& w, const State& state) const {
    const Lanes<C>& lanes = w.lanes;
    const auto put = [&](const HeadTensor<void*>& t, int64_t i, C value) {
      static_cast<C*>(t.data)[lanes.offset(t, i)] = value;
    };
    for (int64_t i = 0; i < lanes.count; ++i) {
      const bool empty = state.l[i] == 0;
      if (p_.lse.data && i < lanes.rows) put(p_.lse, i, static_cast<C>(state.lse(i)));
      state.l[i] = empty ? C(0) : C(1) / state.l[i];
      if (i >= lanes.rows) continue;
      put(p_.stats.top, i, empty ? std::numeric_limits<C>::infinity() : state.m[i]);
      put(p_.stats.weight, i, state.l[i]);
    }
    if (!p_.o.data) return;
    for (int64_t p = 0; p < lanes.panels && !dot_; ++p) {
      const LanePanel& panel = lanes.panel[p];
      lanes_to_rows(lanes, panel, state.of(panel), state.l + panel.lane, p_.o, s_.dtype, s_.Dv);
    }
    for (int64_t l = 0; dot_ && l < lanes.rows; ++l)
      for (int64_t x = 0; x < s_.Dv; x += V::size)
        store_any<C>(s_.dtype, p_.o.data, lanes.offset(p_.o, l) + x,
                     V::load(state.o + l * state.ld() + x) * V::set1(state.l[l]),
                     static_cast<int>(std::min<int64_t>(V::size, s_.Dv - x)));
  }
};

DLK_ISA_END
