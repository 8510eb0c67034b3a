// The backward of attention. A task has a group of key heads (usually one) and a part of their keys, which
// it processes in chunks: the chunk's dk and dv stay in the cache while the task goes through all query rows
// in blocks. For each tile the probabilities P are computed again from the softmax's statistics, then
//   dP = v do^T,  dS = P (dP - delta + dlse),  delta = sum(do o),
// all of them [key][lane], and dv += P do, dk += dS q, dq += dS k. If the keys are split, the task that ends
// last adds up the parts' dq, in order.
#pragma once

#include "attention/cpu/delta.h"
#include "attention/cpu/dot.h"
#include "attention/cpu/gradients.h"
#include "attention/cpu/mask_gradient.h"
#include "attention/cpu/packed_backward.h"

DLK_ISA_BEGIN

template <class C>
class AttentionBackward {
 public:
  using V = Vec<C>;

  AttentionBackward(const AttentionBackwardParams& params, const AttentionPlan& plan, const AttentionTasks& tasks)
      : p_(params),
        in_(params.in),
        s_(params.in.shape),
        plan_(plan),
        tasks_(tasks),
        scores_(params.in),
        dot_(plan.kernel == AttentionPlan::dot),
        gradients_(params.in, scores_),
        deltas_(params, scores_),
        mask_sums_(params, plan),
        hides_(params.in.causal != Causal::none || params.in.left >= 0 || params.in.right >= 0 || params.in.mask.data) {
    int64_t longest = 0;
    for (int64_t b = 0; b < s_.B; ++b) {
      const AttentionSequence sequence(in_, b);
      longest = std::max(longest, sequence.M * s_.group());
      keys_ = std::max(keys_, sequence.N);
    }
    blocks_ = (longest + plan.block_m - 1) / plan.block_m;
    const int64_t fit = kChunkElements / std::max<int64_t>(1, s_.D + s_.Dv) / plan.block_n * plan.block_n;
    chunk_ = std::min(std::max(fit, plan.block_n), (keys_ + plan.block_n - 1) / plan.block_n * plan.block_n);
    lanes_ = Lanes<C>::lanes_for(plan.block_m);
    dq_stride_ = blocks_ * lanes_ * lanes_rounded<C>(s_.D);
    copies_ = !kPacked || hides_;
  }

  int64_t task_count() const { return tasks_.groups() * plan_.splits; }

  void carve(Scratch& scratch) {
    const int64_t D = lanes_rounded<C>(s_.D), Dv = lanes_rounded<C>(s_.Dv);
    for (int n = 0; n < plan_.threads; ++n) {
      Worker& w = workers_[n];
      w.lanes.carve(scratch, plan_.block_m);
      w.q = scratch.take<C>(kPacked ? 0 : lanes_ * D);
      w.grad = scratch.take<C>(lanes_ * s_.Dv);
      w.q_rows = scratch.take<C>(copies_ ? lanes_ * D : 0);
      w.grad_rows = scratch.take<C>(copies_ ? lanes_ * Dv : 0);
      w.o = scratch.take<C>(Lanes<C>::kWidth * s_.Dv);
      w.rows.top = scratch.take<C>(lanes_);
      w.rows.weight = scratch.take<C>(lanes_);
      w.rows.delta = scratch.take<C>(lanes_);
      w.rows.slope_sums = scratch.take<C>(p_.dslopes ? lanes_ : 0);
      w.rows.words = gradients_.carve_words(scratch);
      w.scores = scratch.take<C>(plan_.block_n * lanes_);
      w.ds = scratch.take<C>(plan_.block_n * lanes_);
      w.damping = scratch.take<C>(in_.softcap != 0 ? plan_.block_n * lanes_ : 0);
      w.bias = scratch.take<C>(in_.mask.data ? (plan_.block_n + V::size) * Lanes<C>::kWidth : 0);
      w.k = scratch.take<C>(copies_ ? chunk_ * D : 0);
      w.v = scratch.take<C>(copies_ ? chunk_ * Dv : 0);
      w.dk = scratch.take<C>(chunk_ * D);
      w.dv = scratch.take<C>(chunk_ * Dv);
      w.dq = scratch.take<C>(p_.dq.data && plan_.splits == 1 ? dq_stride_ : 0);
      if constexpr (kPacked) w.packed.carve(scratch, s_, lanes_, chunk_, plan_.block_n);
    }
    if (p_.dq.data && plan_.splits > 1) {
      dq_parts_ = scratch.take<C>(s_.B * s_.Hkv * plan_.splits * dq_stride_);
      arrived_ = scratch.take<std::atomic<int64_t>>(s_.B * s_.Hkv);
    }
    slope_parts_ = scratch.take<double>(p_.dslopes ? s_.B * s_.H * plan_.splits : 0);
    deltas_.carve(scratch);
    mask_sums_.carve(scratch);
  }

  void begin() {
    for (int64_t i = 0; arrived_ && i < s_.B * s_.Hkv; ++i) new (&arrived_[i]) std::atomic<int64_t>(0);
    if (slope_parts_) std::fill_n(slope_parts_, s_.B * s_.H * plan_.splits, 0.0);
    deltas_.begin();
    mask_sums_.begin();
  }

  // Whether the deltas are computed before the tasks. If every task has all keys in one chunk, it can compute them
  // itself, but only for rows that see something, which does not suffice for the gradients of sinks.
  bool prepares() const { return plan_.splits > 1 || keys_ > chunk_ || p_.dsinks; }

  // Runs before the tasks: computes the deltas of all rows that share the keys of head `index`.
  void prepare(int worker, int64_t index) {
    Worker& w = workers_[worker];
    each_block(w, index / s_.Hkv, index % s_.Hkv, [&](int64_t) { make_deltas(w); });
  }

  void run(int worker, int64_t index) {
    const int64_t group = index / plan_.splits, split = index % plan_.splits;
    for (int64_t i = tasks_.group_begin[static_cast<size_t>(group)];
         i < tasks_.group_begin[static_cast<size_t>(group) + 1]; ++i) {
      const auto [b, kv_head] = tasks_.heads[static_cast<size_t>(i)];
      run_head(workers_[worker], b, kv_head, split);
    }
  }

  void finish() {
    deltas_.finish();
    mask_sums_.finish();
    if (p_.dslopes) {
      std::fill_n(p_.dslopes, in_.slopes_b ? s_.B * s_.H : s_.H, 0.0);
      for (int64_t b = 0; b < s_.B; ++b)
        for (int64_t h = 0; h < s_.H; ++h)
          for (int64_t split = 0; split < plan_.splits; ++split)
            p_.dslopes[b * in_.slopes_b + h] += slope_parts_[(b * s_.H + h) * plan_.splits + split];
    }
  }

 private:
  static constexpr int64_t kChunkElements = 64 << 10;  // of dk and dv together, for L2
  static constexpr bool kPacked = Bf16Unit::kPresent;

  struct Worker {
    Lanes<C> lanes;
    C *q, *grad;            // panels [width][lanes] of q and do; q as rows for dot products
    C *q_rows, *grad_rows;  // strips (tile.h), each [lane][width of the strip]
    typename ScoreGradients<C>::Rows rows;
    C* o;                      // a panel of the output
    C *scores, *ds, *damping;  // [key][lanes of the block]
    C* bias;
    C *k, *v, *dk, *dv;  // of a chunk
    C* dq;               // of all rows: blocks of panels [D, whole vectors][lanes]
    PackedBackward<C, Bf16Unit> packed;
  };

  // Keys [first, first + keys) of one head.
  struct Chunk {
    int64_t first, keys;
    KeyRows<C> k, v;
    bool finite;
  };

  const AttentionBackwardParams& p_;
  const AttentionInputs& in_;
  const AttentionShape& s_;
  const AttentionPlan& plan_;
  const AttentionTasks& tasks_;
  Scores<C> scores_;
  bool dot_;
  ScoreGradients<C> gradients_;
  RowDeltas<C> deltas_;
  MaskGradientSums<C> mask_sums_;
  bool hides_;   // whether anything may be hidden
  bool copies_;  // whether q, k, v and do are needed in the compute type: with a bf16 unit only if something is hidden
  int64_t keys_ = 0, blocks_, chunk_, lanes_, dq_stride_;
  Worker workers_[kMaxMembers];
  C* dq_parts_ = nullptr;
  std::atomic<int64_t>* arrived_ = nullptr;
  double* slope_parts_ = nullptr;  // [B * H][splits]

  C* dq_of(Worker& w, int64_t b, int64_t kv_head, int64_t split) const {
    return plan_.splits == 1 ? w.dq : dq_parts_ + ((b * s_.Hkv + kv_head) * plan_.splits + split) * dq_stride_;
  }

  template <class F>
  void each_block(Worker& w, int64_t b, int64_t kv_head, F f) const {
    const int64_t rows = AttentionSequence(in_, b).M * s_.group();
    const int64_t blocks = (rows + plan_.block_m - 1) / plan_.block_m;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = part_begin(rows, AttentionTasks::kRowGrain, blocks, i);
      const int64_t end = part_begin(rows, AttentionTasks::kRowGrain, blocks, i + 1);
      w.lanes.set(in_, b, kv_head, begin, end - begin);
      f(i);
    }
  }

  void run_head(Worker& w, int64_t b, int64_t kv_head, int64_t split) {
    const AttentionSequence sequence(in_, b);
    C* dq = dq_of(w, b, kv_head, split);
    if (p_.dq.data) std::fill_n(dq, dq_stride_, C(0));
    const int64_t begin = part_begin(sequence.N, plan_.block_n, plan_.splits, split);
    const int64_t end = part_begin(sequence.N, plan_.block_n, plan_.splits, split + 1);
    for (int64_t j = begin; j < end; j += chunk_) run_chunk(w, b, kv_head, split, j, std::min(chunk_, end - j), dq);
    if (!p_.dq.data) return;
    if (plan_.splits > 1) {
      if (arrived_[b * s_.Hkv + kv_head].fetch_add(1, std::memory_order_acq_rel) + 1 < plan_.splits) return;
      dq = dq_of(w, b, kv_head, 0);
      for (int64_t other = 1; other < plan_.splits; ++other) {
        const C* from = dq_of(w, b, kv_head, other);
        for (int64_t x = 0; x < dq_stride_; x += V::size) (V::load(dq + x) + V::load(from + x)).store(dq + x);
      }
    }
    const V scale = V::set1(static_cast<C>(in_.scale));
    each_block(w, b, kv_head, [&](int64_t block) {
      for (int64_t l = 0; l < w.lanes.count; l += V::size) scale.store(w.rows.weight + l);
      for (int64_t p = 0; p < w.lanes.panels; ++p) {
        const LanePanel& panel = w.lanes.panel[p];
        lanes_to_rows(w.lanes, panel, dq + (block * lanes_ + panel.lane) * lanes_rounded<C>(s_.D), w.rows.weight, p_.dq,
                      s_.dtype, s_.D);
      }
    });
  }

  void run_chunk(Worker& w, int64_t b, int64_t kv_head, int64_t split, int64_t first, int64_t keys, C* dq) {
    const AttentionSequence sequence(in_, b);
    const auto address = [&](const HeadTensor<const void*>& t) {
      return advance(t.data, s_.dtype, key_offset(in_, sequence, t, b, kv_head, first));
    };
    const auto read = [&](const HeadTensor<const void*>& t, int64_t width, C* copy) {
      if (!copies_) return KeyRows<C>{nullptr, 0};
      return read_rows<C>(s_.dtype, address(t), t.row, keys, width, rows_in_place<C>(s_.dtype, t.row, width), copy);
    };
    const int64_t D = lanes_rounded<C>(s_.D), Dv = lanes_rounded<C>(s_.Dv);
    Chunk chunk{first, keys, read(in_.k, s_.D, w.k), read(in_.v, s_.Dv, w.v), true};
    chunk.finite = !hides_ || all_finite(chunk.k.data, chunk.k.ld, keys, s_.D);
    if constexpr (kPacked) w.packed.set_keys(address(in_.k), in_.k.row, address(in_.v), in_.v.row, keys);
    std::fill_n(w.dk, keys * D, C(0));
    std::fill_n(w.dv, keys * Dv, C(0));
    each_block(w, b, kv_head, [&](int64_t block) {
      if (sees(w.lanes, first, keys)) {
        run_block(w, chunk, split, dq + block * lanes_ * D);
      } else {
        for (int64_t p = 0; p < w.lanes.panels; ++p) mask_sums_.hide(w.lanes, w.lanes.panel[p], first, first + keys);
      }
    });
    if (!p_.dk.data) return;
    store_chunk(w.dk, D, p_.dk, s_.D, key_offset(in_, sequence, p_.dk, b, kv_head, first), keys, in_.scale);
    store_chunk(w.dv, Dv, p_.dv, s_.Dv, key_offset(in_, sequence, p_.dv, b, kv_head, first), keys, 1);
  }

  void store_chunk(const C* from, int64_t ld, const HeadTensor<void*>& t, int64_t width, int64_t at, int64_t keys,
                   double factor) const {
    const V times = V::set1(static_cast<C>(factor));
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t x = 0; x < width; x += V::size)
        store_any<C>(s_.dtype, t.data, at + j * t.row + x, V::load(from + j * ld + x) * times,
                     static_cast<int>(std::min<int64_t>(V::size, width - x)));
  }

  static bool sees(const Lanes<C>& lanes, int64_t first, int64_t keys) {
    for (int64_t p = 0; p < lanes.panels; ++p)
      if (lanes.panel[p].first_begin < first + keys && lanes.panel[p].last_end > first) return true;
    return false;
  }

  void make_deltas(Worker& w) {
    read_grad(w);
    deltas_.make(w.lanes, w.grad, w.o);
  }

  void read_grad(Worker& w) const {
    for (int64_t p = 0; p < w.lanes.panels; ++p)
      rows_to_lanes(w.lanes, w.lanes.panel[p], p_.grad_o, s_.dtype, s_.Dv, w.grad + w.lanes.panel[p].lane * s_.Dv);
  }

  // Computes the gradients of the rows of w.lanes and the keys of a chunk.
  void run_block(Worker& w, const Chunk& chunk, int64_t split, C* dq) {
    Lanes<C>& lanes = w.lanes;
    const int64_t D = lanes_rounded<C>(s_.D), Dv = lanes_rounded<C>(s_.Dv);
    if (!prepares()) {
      make_deltas(w);
    } else if (!kPacked) {
      read_grad(w);
    }
    if constexpr (kPacked) w.packed.set_rows(lanes, in_.q, p_.grad_o);
    for (int64_t p = 0; p < lanes.panels && !dot_ && !kPacked; ++p)
      rows_to_lanes(lanes, lanes.panel[p], in_.q, s_.dtype, s_.D, w.q + lanes.panel[p].lane * s_.D);
    for (int64_t l = 0; dot_ && l < lanes.rows; ++l)
      load_row<C>(s_.dtype, lanes.row_of(in_.q, s_.dtype, l), s_.D, w.q + l * D);
    if (copies_) rows_to_strips(lanes, in_.q, s_.dtype, s_.D, w.q_rows);
    if (copies_) rows_to_strips(lanes, p_.grad_o, s_.dtype, s_.Dv, w.grad_rows);
    read_statistics(w);
    if (p_.dslopes) std::fill_n(w.rows.slope_sums, lanes.count, C(0));
    const bool finite = !hides_ || (chunk.finite && all_finite(w.q_rows, D, lanes.rows, D) &&
                                    all_finite(w.grad_rows, Dv, lanes.rows, Dv));
    for (int64_t j = 0; j < chunk.keys; j += plan_.block_n)
      run_tile(w, chunk, j, std::min(plan_.block_n, chunk.keys - j), split, dq, finite);
    for (int64_t l = 0; p_.dslopes && l < lanes.rows; ++l)
      slope_parts_[(lanes.b * s_.H + lanes.head[l]) * plan_.splits + split] -=
          static_cast<double>(w.rows.slope_sums[l]);
  }

  // Reads the statistics of the block's rows; lanes without a row get those of a row that sees nothing.
  void read_statistics(Worker& w) const {
    const Lanes<C>& lanes = w.lanes;
    for (int64_t l = 0; l < lanes.count; ++l) {
      lanes.read_statistics(p_.stats, l, w.rows.top + l, w.rows.weight + l);
      C& delta = w.rows.delta[l];
      delta = l < lanes.rows ? deltas_.at(lanes, l) : C(0);
      if (l < lanes.rows && p_.grad_lse.data)
        delta -= static_cast<const C*>(p_.grad_lse.data)[lanes.offset(p_.grad_lse, l)];
    }
  }

  void run_tile(Worker& w, const Chunk& chunk, int64_t at, int64_t keys, int64_t split, C* dq, bool finite) {
    const Lanes<C>& lanes = w.lanes;
    const int64_t ld = lanes.count, D = lanes_rounded<C>(s_.D), Dv = lanes_rounded<C>(s_.Dv);
    int64_t begin = keys, end = 0;  // those of the block's keys that some panel sees
    for (int64_t p = 0; p < lanes.panels; ++p) {
      ScoreTile<C> tile;
      if (!scores_.clip(lanes.panel[p], chunk.first + at, keys, &tile)) continue;
      begin = std::min(begin, tile.first - chunk.first - at);
      end = std::max(end, tile.first - chunk.first - at + tile.keys);
    }
    bool masked = false, any = false;
    for (int64_t p = 0; p < lanes.panels; ++p) {
      const LanePanel& panel = lanes.panel[p];
      ScoreTile<C> tile;
      tile.ld = ld, tile.bias = w.bias;
      const bool seen = scores_.clip(panel, chunk.first + at, keys, &tile) && scores_.read_mask(lanes, &tile);
      const int64_t skipped = seen ? tile.first - chunk.first - at : begin, count = seen ? tile.keys : 0;
      masked = masked || !seen || tile.masked() || skipped > begin || skipped + count < end;
      any = any || seen;
      tile.scores = w.scores + skipped * ld + panel.lane;
      if (seen) run_panel(w, chunk, tile, at, KeyRange{skipped, count}, keys, split, dq + panel.lane * D, finite);
      clear_lanes(w, panel, begin, skipped, ld);
      clear_lanes(w, panel, skipped + count, end, ld);
      mask_sums_.hide(lanes, panel, chunk.first + at, chunk.first + at + skipped);
      mask_sums_.hide(lanes, panel, chunk.first + at + skipped + count, chunk.first + at + keys);
    }
    if (!any || !p_.dk.data) return;
    const KeyRange range{begin, end - begin};
    const bool selected = (masked || (kPacked && !range.fills(Bf16Unit::kRows, keys))) && !finite;
    if constexpr (kPacked) {
      if (!selected) {
        w.packed.add_dv(at, range, w.scores, ld, lanes.rows, w.dv);
        return w.packed.add_dk(at, range, w.ds, ld, lanes.rows, w.dk);
      }
    }
    add_strips(selected, end - begin, w.scores + begin * ld, ld, lanes.rows, w.grad_rows, w.dv + (at + begin) * Dv, Dv);
    add_strips(selected, end - begin, w.ds + begin * ld, ld, lanes.rows, w.q_rows, w.dk + (at + begin) * D, D);
  }

  // Sets the probabilities and gradients of keys [from, to) of the block to 0.
  void clear_lanes(Worker& w, const LanePanel& panel, int64_t from, int64_t to, int64_t ld) const {
    for (int64_t j = from; j < to; ++j)
      for (int64_t l = panel.lane; l < panel.lane + int64_t{panel.vectors} * V::size; l += V::size) {
        V::zero().store(w.scores + j * ld + l);
        V::zero().store(w.ds + j * ld + l);
      }
  }

  // Computes the probabilities and the gradients of the scores of one panel, and adds to its dq, for a range of the
  // `keys` keys from key `at` of the chunk on.
  void run_panel(Worker& w, const Chunk& chunk, const ScoreTile<C>& tile, int64_t at, const KeyRange& range,
                 int64_t keys, int64_t split, C* dq, bool finite) {
    const int64_t lane = tile.panel->lane, width = tile.width(), ld = tile.ld;
    const int vectors = tile.panel->vectors;
    const int64_t offset = tile.scores - w.scores;
    C *ds = w.ds + offset, *damping = w.damping ? w.damping + offset : nullptr;
    const int64_t key = at + range.first;
    const C *k = chunk.k.data + key * chunk.k.ld, *v = chunk.v.data + key * chunk.v.ld;
    if constexpr (kPacked) {
      w.packed.score(*tile.panel, at, range, w.scores, w.ds, ld);
    } else if (dot_) {  // the same bits as in the forward
      const int64_t ldq = lanes_rounded<C>(s_.D);
      tile.clear_spare_lanes();
      dot_rows(tile.panel->rows, w.q + lane * ldq, ldq, s_.D, k, chunk.k.ld, tile.keys, tile.scores, ld, RowsAhead{});
    } else {
      multiply_rows(tile.keys, vectors, k, chunk.k.ld, s_.D, w.q + lane * s_.D, tile.scores, ld, false);
    }
    if (!kPacked) multiply_rows(tile.keys, vectors, v, chunk.v.ld, s_.Dv, w.grad + lane * s_.Dv, ds, ld, false);
    scores_.apply(w.lanes, tile, damping);
    gradients_.make(w.lanes, tile, w.rows, ds);
    if (p_.dslopes) gradients_.add_slopes(w.lanes, tile, w.rows, ds);
    if (mask_sums_.wanted()) mask_sums_.add(w.lanes, tile, ds, split);
    if (damping) gradients_.damp(tile, damping, ds);
    if (!p_.dq.data) return;
    const bool selected = (tile.masked() || (kPacked && !range.fills(Bf16Unit::kDepth, keys))) && !finite;
    if (selected) {
      add_selected<C, Lies::columns, false>(s_.D, width, k, chunk.k.ld, tile.keys, ds, ld, dq, width);
    } else if constexpr (kPacked) {
      w.packed.add_dq(*tile.panel, at, range, w.ds, ld, dq);
    } else {
      add_columns(s_.D, vectors, k, chunk.k.ld, tile.keys, ds, ld, dq, width);
    }
  }
};

DLK_ISA_END
