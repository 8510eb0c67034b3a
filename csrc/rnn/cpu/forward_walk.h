// The steps of the forward of one direction, for the sequences and units of one thread
// (see forward.h).
#pragma once

#include "rnn/cpu/forward.h"

DLK_ISA_BEGIN

template <class C, class Cell>
struct Forward<C, Cell>::Walk {
  static constexpr bool kDots = kItemValues == 1 && kWeights == Weights::given;  // whether Plan::dot is possible
  static constexpr int64_t kTurn = 8;  // most panels that are multiplied before their cells run

  const Forward& forward;
  Member member;
  SequenceSubset subset;
  Tables& table;
  int d;
  int64_t slot;                 // the thread's first row in the state buffers
  bool ending = false;          // the current step is the last one of some sequence
  Operand<C>* quads = nullptr;  // h of the step's sequences, and its scales (kQuads only)
  C* scales = nullptr;

  const LayerShape& s() const { return forward.s_; }
  const DirectionWeights& weights() const { return forward.p_.weights[d]; }
  int64_t time(int64_t nth) const { return d == 0 ? nth : forward.layout_.steps() - 1 - nth; }
  C* h(int64_t parity, int64_t i) const {
    return forward.h_[d] + (parity * forward.slots() + slot + i) * forward.ld_h_;
  }
  Operand<C>* rounded(int64_t parity, int64_t i) const {
    return forward.rounded_[d] + (parity * forward.slots() + slot + i) * forward.ld_h_;
  }
  // h as an operand of products, in items (tile.h).
  const C* operand(int64_t parity, int64_t i) const {
    if constexpr (kPairs) return items_of<C>(rounded(parity, i));
    if constexpr (kQuads) return items_of<C>(quads + i * forward.ld_h_);
    return h(parity, i);
  }
  // Makes quads of h of the step's sequences, for all threads that share them.
  void quantize_h(int64_t parity, int64_t alive) {
    const bool alone = member.size > 1 && alive <= kOwnRows;
    quads = alone ? table.own_h : forward.rounded_[d] + slot * forward.ld_h_;
    scales = alone ? table.own_scales : forward.h_scales_[d] + slot;
    int64_t begin = 0, end = alive;
    if (!alone) member.share(alive, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i)
      scales[i] = Int8Quads<C>::quantize(h(parity, i), forward.O_, quads + i * forward.ld_h_);
    if (!alone) member.sync();
  }
  // Stores n values of h from unit j on. As an operand h must be 0 from the last unit on (begin_states).
  DLK_INLINE void put_h(int64_t parity, int64_t i, int64_t j, int n, V value) const {
    if constexpr (kKeepsH) value.store(h(parity, i) + j);
    if constexpr (kPairs) store_operands<C>(rounded(parity, i) + j, value, n);
  }
  // c of the units from j on; j is a multiple of Vec::size.
  C* c(int64_t i, int64_t j) const { return forward.c_[d] + j * forward.slots() + (slot + i) * V::size; }
  C* product(int64_t row, int64_t j, int g) const {
    if (forward.in_place_) return table.saved[row] + g * s().H + j;
    return forward.products_[d] + (j * forward.chunk_rows_ + (slot * forward.chunk_ + row) * V::size) * Cell::kGates +
           g * V::size;
  }
  Operand<C>* cell_out(int64_t i) const { return forward.cell_out_[d] + (slot + i) * forward.ld_cell_; }
  // Offset of sequence i in a [D, B, features] state.
  int64_t state(int64_t i, int64_t features) const { return (d * s().B + subset.sequence(i)) * features; }
  bool is_last(int64_t i, int64_t t) const { return ending && (d == 1 || t == subset.length(i) - 1); }

  void go() {
    begin_states();
    member.sync();
    const int64_t steps = forward.layout_.steps();
    for (int64_t nth = 0; nth < steps; nth += forward.chunk_) {
      const int64_t count = std::min(forward.chunk_, steps - nth);
      number_rows(nth, count);
      if (!forward.fused_) {
        project(table.first[count]);
        member.sync();
      }
      for (int64_t k = 0; k < count; ++k) {
        step(nth + k, table.first[k], table.first[k + 1] - table.first[k]);
        member.sync();
      }
    }
  }

  void begin_states() {
    int64_t begin, end;
    member.share(subset.count, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      const bool empty = subset.length(i) == 0;
      if constexpr (kPairs)
        for (int parity = 0; parity < 2; ++parity)
          std::fill_n(rounded(parity, i) + forward.O_, forward.ld_h_ - forward.O_, Operand<C>{});
      if (kPairs && s().P) std::fill_n(cell_out(i) + s().H, forward.ld_cell_ - s().H, Operand<C>{});
      each_vector(forward.O_, [&](int64_t j, int n) {
        const V value = load_state<C>(forward.p_.h0, state(i, forward.O_) + j, n);
        for (int parity = 0; parity < 2; ++parity) put_h(parity, i, j, n, value);
        if (empty) store_state<C>(forward.p_.h_n, state(i, forward.O_) + j, value, n);
      });
      if constexpr (Cell::kCellState)
        each_vector(s().H, [&](int64_t j, int n) {
          const V value = load_state<C>(forward.p_.c0, state(i, s().H) + j, n);
          value.store(c(i, j));
          if (empty) store_state<C>(forward.p_.c_n, state(i, s().H) + j, value, n);
        });
    }
  }

  template <class Do>
  static DLK_INLINE void each_vector(int64_t size, Do act) {
    for (int64_t j = 0; j < size; j += V::size) act(j, static_cast<int>(std::min<int64_t>(V::size, size - j)));
  }

  void number_rows(int64_t nth, int64_t count) {
    const SequenceLayout& layout = forward.layout_;
    int64_t row = 0, alive = subset.count;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t t = time(nth + k);
      alive = subset.alive(t, alive);
      table.first[k] = row;
      for (int64_t i = 0; i < alive; ++i, ++row) {
        const int64_t b = subset.sequence(i);
        table.x[row] = advance(forward.p_.x.data, forward.p_.x.dtype, layout.at(forward.p_.x, t, b));
        table.y[row] = layout.at(forward.p_.y, t, b) + d * forward.O_;
        if (forward.p_.saved)
          table.saved[row] =
              static_cast<C*>(forward.p_.saved) + (d * s().rows + layout.row(t, b)) * forward.record_.size;
      }
    }
    table.first[count] = row;
  }

  // Computes the products of x with W_ih for the first `rows` rows of the chunk, and adds the biases.
  void project(int64_t rows) const {
    const C* bias = forward.weight_memory_[d] + forward.weights_.bias_at;
    if constexpr (kDots) {
      if (forward.plan_.recurrence == Plan::dot) return project_dot(rows);
    }
    const PanelShape& shape = forward.weights_.ih;
    const GemmShare share(member, rows, shape, forward.fresh_);
    const auto out = [&](int64_t row, GemmColumn at) -> const void* { return product(row, unit(at), gate(at)); };
    const auto sink = [&](int64_t row, GemmColumn at, V value, int n) {
      const C scale = kQuads ? table.x_scales[row] : C(1);
      value = products_of(value, forward.weight_memory_[d], forward.weights_.ih_scales, at.column, scale);
      put_product(row, unit(at), gate(at), value + V::load(bias + at.column), n);
    };
    const auto x_row = [&](int64_t row) { return table.x[row]; };
    const Panels<C> panels = forward.panels(shape, forward.weights_.ih_at, forward.p_.weights[d].w_ih, d, table);
    if constexpr (kQuads) {
      const QuantizedRows<C, decltype(x_row)> a{x_row, s().I, block_ld<C>(shape.K), table.block, table.x_scales};
      gemm(share.m0, share.m1, share.p0, share.p1, a, panels, out, sink);
    } else if (!forward.copies_x()) {
      gemm(share.m0, share.m1, share.p0, share.p1, DirectRows<C, decltype(x_row)>{x_row}, panels, out, sink);
    } else {
      const CopiedRows<C, decltype(x_row)> a{x_row, forward.p_.x.dtype, s().I, block_ld<C>(shape.K), table.block};
      gemm(share.m0, share.m1, share.p0, share.p1, a, panels, out, sink);
    }
  }

  static int gate(GemmColumn at) { return Cell::kGates > 1 ? at.vector : 0; }
  static int64_t unit(GemmColumn at) { return Cell::kGates > 1 ? at.panel * V::size : at.column; }

  DLK_INLINE void put_product(int64_t row, int64_t j, int g, V value, int n) const {
    if (forward.in_place_) {
      store_part(product(row, j, g), value, n);
    } else {
      value.store(product(row, j, g));
    }
  }

  // Sets the state to zero where the caller's flags say so.
  void reset_states(int64_t t, int64_t parity, int64_t alive) const {
    int64_t begin, end;
    member.share(alive, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) {
      if (!subset.is_reset(d, t, i)) continue;
      each_vector(forward.O_, [&](int64_t j, int n) { put_h(parity, i, j, n, V::zero()); });
      if constexpr (Cell::kCellState) each_vector(s().H, [&](int64_t j, int) { V::zero().store(c(i, j)); });
    }
    member.sync();
  }

  void step(int64_t nth, int64_t first, int64_t alive) {
    const int64_t t = time(nth), parity = nth & 1;
    if (forward.layout_.may_reset(d, t)) reset_states(t, parity, alive);
    ending = d == 1 ? t == 0 : t + 1 == forward.layout_.steps() || subset.alive(t + 1, alive) < alive;
    if constexpr (kDots) {
      if (forward.plan_.recurrence == Plan::dot) step_dot(t, parity, first, alive);
    }
    if (forward.plan_.recurrence == Plan::tiles) step_tiles(t, parity, first, alive);
    if constexpr (Cell::kCellState && !kQuads) {  // only the lstm has projections, and layers with one take no quads
      if (!s().P) return;
      member.sync();
      project_outputs(t, parity, first, alive);
    }
  }

  // n units of one row from j on. `hidden` points to their products with W_hh: one vector per gate.
  struct Units {
    const C* hidden;
    int64_t row, i, j;
    int n;
  };

  // forward_dot.h
  void project_dot(int64_t rows) const;
  void step_dot(int64_t t, int64_t parity, int64_t first, int64_t alive);
  void project_outputs(int64_t t, int64_t parity, int64_t first, int64_t alive) const;

  // x of the step's i-th sequence; the step begins with row `first` of the chunk.
  const C* x_operand(int64_t first, int64_t i) const {
    return forward.copies_x() ? x_copy(i) : static_cast<const C*>(table.x[first + i]);
  }
  C* x_copy(int64_t i) const { return forward.x_rows_[d] + (slot + i) * block_ld<C>(forward.weights_.ih.K); }
  void copy_x(int64_t first, int64_t alive) const {
    if (!forward.copies_x()) return;
    int64_t begin, end;
    member.share(alive, 1, &begin, &end);
    for (int64_t i = begin; i < end; ++i) load_operands<C>(forward.p_.x.dtype, table.x[first + i], s().I, x_copy(i));
    member.sync();
  }

  void step_tiles(int64_t t, int64_t parity, int64_t first, int64_t alive) {
    const PanelShape &shape = forward.weights_.hh, &x_shape = forward.weights_.ih;
    const Panels<C> panels = forward.panels(shape, forward.weights_.hh_at, forward.p_.weights[d].w_hh, d, table);
    const Panels<C> x_panels = forward.panels(x_shape, forward.weights_.ih_at, forward.p_.weights[d].w_ih, d, table);
    if (forward.fused_) copy_x(first, alive);
    if constexpr (kQuads) quantize_h(parity, alive);
    TileBuffer<C> out;
    int64_t p0, p1;
    member.share(shape.count(), 1, &p0, &p1);
    // With few rows the buffer has room for the tiles of several panels: the products then read
    // the weights without interruption, and the long dependency chains of the cells overlap.
    // Panels that are packed on the fly share one buffer, so each is used before the next.
    const int64_t most = kTiles ? kMaxRows / kRowUnit : kTurn, height = (alive + kRowUnit - 1) / kRowUnit,
                  together = forward.fresh_ ? 1 : most / std::clamp<int64_t>(height, 1, most);
    for (int64_t turn = p0; turn < p1; turn += together) {
      const int count = static_cast<int>(std::min(together, p1 - turn));
      // The order of the panels alternates, so that a step begins with those that the last step left in the cache.
      const int64_t p = parity ? p0 + p1 - turn - count : turn;
      Ahead<C> ahead, x_ahead;
      if (turn + together < p1) {
        const int64_t next = parity ? p - together : p + count;
        ahead = panels.ahead(next, next + together, alive);
        if (forward.fused_) x_ahead = x_panels.ahead(next, next + together, alive);
      }
      Panel<C> panel[kTurn], x_panel[kTurn];
      for (int k = 0; k < count; ++k) {
        panel[k] = panels.at(p + k);
        if (forward.fused_) x_panel[k] = x_panels.at(p + k);
      }
      int rows;
      for (int64_t i0 = 0; i0 < alive; i0 += rows) {
        rows = next_tile(alive - i0, shape.vectors_in(p));
        const C *a[kMaxRows], *x[kMaxRows];
        for (int r = 0; r < rows; ++r) a[r] = operand(parity, i0 + r);
        for (int r = 0; r < rows && forward.fused_; ++r) x[r] = x_operand(first, i0 + r);
        if (turn == p0 && member.size > 1) collect(rows, a, shape.K);
        C* tile = out.data;
        const int64_t size = whole_rows(rows) * kMaxVectors * V::size;
        for (int k = 0; k < count; ++k, tile += size) {
          const auto before = [&](int part, int parts) {
            for (int r = part; r < rows; r += parts) fetch(p + k, first + i0 + r, i0 + r, parity);
          };
          if (forward.fused_) {
            run_two_tiles(rows, x, x_shape.K, x_panel[k], x_ahead, a, shape.K, panel[k], ahead, tile, before);
          } else {
            run_tile(rows, a, shape.K, panel[k], tile, false, ahead, before);
          }
        }
        tile = out.data;
        Pending pending(*this, t, parity);
        for (int k = 0; k < count; ++k, tile += size) {
          const int vectors = shape.vectors_in(p + k);
          for (int r = 0; r < rows; ++r) {
            // Prefetched a second time, because reading the panel may have evicted what was fetched before the product.
            if (r + 3 < rows) fetch(p + k, first + i0 + r + 3, i0 + r + 3, parity);
            for (int v = 0; v < vectors; v += Cell::kGates) {
              const int64_t j = (p + k) * shape.units_per_panel() + v / Cell::kGates * V::size;
              pending.add({tile + (r * vectors + v) * V::size, first + i0 + r, i0 + r, j,
                           static_cast<int>(std::min<int64_t>(V::size, s().H - j))});
            }
          }
        }
      }
    }
  }

  // Prefetches what the cells of panel p read and write for one row.
  DLK_INLINE void fetch(int64_t p, int64_t row, int64_t i, int64_t parity) const {
    const PanelShape& shape = forward.weights_.hh;
    const int vectors = shape.vectors_in(p);
    for (int v = 0; v < vectors; v += Cell::kGates) {
      const int64_t j = p * shape.units_per_panel() + v / Cell::kGates * V::size;
      for (int g = 0; g < Cell::kGates && (forward.in_place_ || !forward.fused_); ++g)
        __builtin_prefetch(product(row, j, g));
      if (forward.p_.saved && !forward.in_place_)
        for (int k = 0; k < Cell::kBounded; ++k) forward.record_.fetch(table.saved[row], k, j);
      if constexpr (Cell::kCellState) __builtin_prefetch(c(i, j), 1);
      if (s().P) continue;
      if constexpr (kKeepsH) __builtin_prefetch(h(1 - parity, i) + j, 1);
      if constexpr (kPairs) __builtin_prefetch(rounded(1 - parity, i) + j, 1);
      if (forward.p_.y.data) __builtin_prefetch(advance(forward.p_.y.data, forward.p_.y.dtype, table.y[row] + j), 1);
    }
  }

  // Holds back the first of two sets of units, so that both pass the cell at once (if kTogether is 2): one set
  // alone is a long chain of dependent instructions.
  struct Pending {
    const Walk& walk;
    const int64_t t, parity;
    int count = 0;
    Units first;

    Pending(const Walk& walk, int64_t t, int64_t parity) : walk(walk), t(t), parity(parity) {}
    ~Pending() {
      if (count) walk.cell(t, parity, first);
    }
    DLK_INLINE void add(const Units& units) {
      if (kTogether == 1) {
        walk.cell(t, parity, units);
      } else if (count == 0) {
        first = units;
        count = 1;
      } else {
        walk.cells(t, parity, first, units);
        count = 0;
      }
    }
  };

  DLK_INLINE void cell(int64_t t, int64_t parity, const Units& u) const {
    V x[Cell::kGates], hidden[Cell::kGates], saved[Cell::kSaved + 1], previous = V::zero();
    DLK_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) x[g] = input(u, g), hidden[g] = hidden_product(u, g);
    if constexpr (Cell::kCellState || Cell::kDirectPath) previous = state_before(parity, u);
    const V out = Cell::forward(x, hidden, previous, saved);
    store_results(t, parity, u, saved, out);
  }

  // Two sets of units at once.
  DLK_INLINE void cells(int64_t t, int64_t parity, const Units& u, const Units& w) const {
    using Both = Pair<V>;
    Both x[Cell::kGates], hidden[Cell::kGates], saved[Cell::kSaved + 1], previous = Both::zero();
    DLK_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) {
      x[g] = {input(u, g), input(w, g)};
      hidden[g] = {hidden_product(u, g), hidden_product(w, g)};
    }
    if constexpr (Cell::kCellState || Cell::kDirectPath) previous = {state_before(parity, u), state_before(parity, w)};
    const Both out = Cell::forward(x, hidden, previous, saved);
    V one[Cell::kSaved + 1], other[Cell::kSaved + 1];
    DLK_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k) one[k] = saved[k].a, other[k] = saved[k].b;
    store_results(t, parity, u, one, out.a);
    store_results(t, parity, w, other, out.b);
  }

  DLK_INLINE V input(const Units& u, int g) const {
    if (forward.fused_) return V::load(forward.weight_memory_[d] + forward.weights_.bias_at + g * s().H + u.j);
    const C* from = product(u.row, u.j, g);
    return forward.in_place_ ? load_part(from, u.n) : V::load(from);
  }
  DLK_INLINE V hidden_product(const Units& u, int g) const {
    const V sum = products_of(V::load(u.hidden + g * V::size), forward.weight_memory_[d], forward.weights_.hh_scales,
                              g * s().H + u.j, kQuads ? scales[u.i] : C(1));
    if (g == Cell::kPartedGate) return sum + V::load(forward.weight_memory_[d] + forward.weights_.hidden_bias_at + u.j);
    return sum;
  }
  DLK_INLINE V state_before(int64_t parity, const Units& u) const {
    if constexpr (Cell::kCellState) return V::load(c(u.i, u.j));
    return V::load(h(parity, u.i) + u.j);
  }

  // Stores what a cell computed: the saved activations, c, and the output.
  DLK_INLINE void store_results(int64_t t, int64_t parity, const Units& u, const V* saved, V out) const {
    if (forward.p_.saved) {
      DLK_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k)
        if (k < Cell::kStateSlot || forward.record_.keeps_state)
          forward.record_.store(table.saved[u.row], k, u.j, saved[k], u.n);
    }
    if constexpr (Cell::kCellState) {
      saved[Cell::kStateSlot].store(c(u.i, u.j));
      if (forward.p_.c_n && is_last(u.i, t))
        store_state<C>(forward.p_.c_n, state(u.i, s().H) + u.j, saved[Cell::kStateSlot], u.n);
      if (const RowTensor<void*>& cells = forward.p_.cells; cells.data)
        store_any<C>(cells.dtype, cells.data, forward.layout_.at(cells, t, subset.sequence(u.i)) + d * s().H + u.j,
                     saved[Cell::kStateSlot], u.n);
    }
    if (s().P) {
      if constexpr (!kQuads) store_operands<C>(cell_out(u.i) + u.j, out, u.n);
    } else {
      emit(t, parity, u.row, u.i, u.j, u.n, out);
    }
  }

  // Stores n outputs from j on: as h for the next step, in y, and in h_n at a sequence's last step.
  DLK_INLINE void emit(int64_t t, int64_t parity, int64_t row, int64_t i, int64_t j, int n, V out) const {
    put_h(1 - parity, i, j, n, out);
    if (forward.p_.y.data) store_output(parity, row, i, j, n, out);
    if (forward.p_.h_n && is_last(i, t)) store_state<C>(forward.p_.h_n, state(i, forward.O_) + j, out, n);
  }

  DLK_INLINE void store_output(int64_t parity, int64_t row, int64_t i, int64_t j, int n, V out) const {
    if constexpr (kPairs) {
      if (forward.p_.y.dtype == DType::bf16) {  // put_h has rounded it
        bf16* to = static_cast<bf16*>(forward.p_.y.data) + table.y[row] + j;
        const bf16* from = rounded(1 - parity, i) + j;
        if (n == V::size) {
          std::memcpy(to, from, V::size * sizeof(bf16));  // one vector, not a call
        } else {
          std::memcpy(to, from, static_cast<size_t>(n) * sizeof(bf16));
        }
        return;
      }
    }
    store_any<C>(forward.p_.y.dtype, forward.p_.y.data, table.y[row] + j, out, n);
  }

  // A projected h cannot be computed from the other saved values, so it is saved too.
  DLK_INLINE void emit_projected(int64_t t, int64_t parity, int64_t row, int64_t i, int64_t j, int n, V out) const {
    if (forward.p_.saved) store_part(table.saved[row] + forward.record_.projected + j, out, n);
    emit(t, parity, row, i, j, n, out);
  }
};

DLK_ISA_END
