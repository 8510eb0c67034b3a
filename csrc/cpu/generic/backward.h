// Backward of one recurrent layer.
//
// Steps are walked in the opposite order of the forward. A step's tiles compute
// dh = dgates(next) W_hh for a few units and go straight through the cell's backward,
// which writes that step's gate gradients. Those of a chunk of steps stay in a buffer,
// and GEMMs over the chunk then make dx and add up the weight gradients, so that no
// gradient tensor of the whole length is ever there. Two buffers alternate: the first
// step of a chunk reads the last one of the chunk before.
//
// Teams split as in the forward; the GEMMs of a chunk are shared by all of the direction.
// No sum depends on the size of the team.

template <class C, class Cell>
class Backward {
  using V = Vec<C>;
  static constexpr int kSlots = Cell::kGateGrads;
  static constexpr int64_t kBiasRows = 16;  // summed by themselves, to keep rounding errors small

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
        ld_gates_(block_ld<C>(kSlots * s_.H)),
        ld_unit_(block_ld<C>(s_.H)),
        ld_proj_(s_.P ? block_ld<C>(s_.P) : 0),
        hh_(weight_shape(G_, O_)),
        ih_(weight_shape(G_, s_.I)),
        hr_(weight_shape(s_.P, s_.H)) {}

  void carve(Scratch& scratch) {
    const bool weights = wants_weights();
    zeros_ = scratch.take<C>(zero_count());
    for (int d = 0; d < s_.D; ++d) {
      Direction& x = direction_[d];
      x.hh = weight_memory(scratch, hh_, p_.weights[d].w_hh);
      x.ih = p_.dx.data ? weight_memory(scratch, ih_, p_.weights[d].w_ih) : nullptr;
      x.hr = weight_memory(scratch, hr_, p_.weights[d].w_hr);
      x.gates = scratch.take<C>(2 * chunk_rows_ * ld_gates_);
      x.proj = scratch.take<C>(2 * chunk_rows_ * ld_proj_);
      x.cell_out = s_.P ? scratch.take<C>(chunk_rows_ * ld_unit_) : nullptr;
      x.carry = Cell::kCellState || Cell::kDirectPath ? scratch.take<C>(s_.B * ld_unit_) : nullptr;
      x.rows = scratch.take<Row>(chunk_rows_);
      x.first = scratch.take<int64_t>(chunk_);
      // Right-hand sides of the weight gradients: x, h and the cell's output, as panels.
      const auto columns = [&](int64_t n) {
        return weights ? chunk_rows_ * ((n + V::size - 1) / V::size * V::size) : 0;
      };
      x.x_panels = scratch.take<C>(columns(s_.I));
      x.h_panels = scratch.take<C>(columns(O_));
      x.out_panels = scratch.take<C>(s_.P ? columns(s_.H) : 0);
      const auto sum = [&](void* out, int64_t n) {
        return is_compute_type<C>(s_.dtype) ? static_cast<C*>(out) : scratch.take<C>(weights ? n : 0);
      };
      x.dw_ih = sum(p_.grads[d].w_ih, G_ * s_.I);
      x.dw_hh = sum(p_.grads[d].w_hh, G_ * O_);
      x.dw_hr = sum(p_.grads[d].w_hr, s_.P * s_.H);
      x.dbias = scratch.take<C>(weights ? block_ld<C>(kSlots * s_.H) : 0);
      x.dx = d == 1 && p_.dx.data ? scratch.take<C>(s_.rows * s_.I) : nullptr;
    }
    for (int m = 0; m < plan_.threads; ++m) block_[m] = scratch.take<C>(kTransposedRows * block_ld<C>(chunk_rows_));
  }

  // Once, before the team starts.
  void begin() { std::fill_n(zeros_, zero_count(), C(0)); }

  void run(const Member& team, int worker, int d) {
    prepare(team, d);
    const bool by_rows = plan_.split == Plan::rows;
    Walk walk{*this, direction_[d], by_rows ? Member{0, 1, nullptr} : team,
              by_rows ? SequenceSubset(layout_, team.rank, team.size) : SequenceSubset(layout_, 0, 1), d};
    walk.begin();
    team.sync();
    const int64_t steps = layout_.steps();
    for (int64_t q = 0; q < steps; q += chunk_) {
      const int64_t count = std::min(chunk_, steps - q), parity = q / chunk_ & 1;
      if (team.rank == 0) number_rows(d, q, count);
      team.sync();
      for (int64_t k = 0; k < count; ++k) {
        walk.step(q + k, k, parity);
        walk.member.sync();
      }
      team.sync();
      chunk_products(team, worker, d, parity, q == 0);
      team.sync();
    }
    walk.finish();
    team.sync();
    store_weight_grads(team, d);
  }

  // After all directions: dx = sum of both, and zeros where there was no input.
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
          store_any<C>(s_.dtype, p_.dx.data, at + j,
                       load_any<C>(s_.dtype, p_.dx.data, at + j, n) + V::load(other + j, n), n);
        }
      }
      if (layout_.packed()) continue;
      for (int64_t t = length; t < s_.T; ++t) {
        if (p_.dx.data)
          std::memset(advance(p_.dx.data, s_.dtype, layout_.at(p_.dx, t, b)), 0, s_.I * item_size(s_.dtype));
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
    int64_t t, b;  // step and sequence
    bool first;    // the sequence's first step: its past is h0, c0
  };

  struct Direction {
    C *hh, *ih, *hr;                      // panels of the weights
    C *gates, *proj;                      // gradients of a chunk's gates and projected h, twice
    C* cell_out;                          // o * tanh(c') of a chunk, for dw_hr
    C* carry;                             // lstm: dc; gru: the part of dh that passes the gates by
    Row* rows;                            // of the chunk
    int64_t* first;                       // first row of each step of the chunk
    int64_t row_count;                    // of the chunk
    C *x_panels, *h_panels, *out_panels;  // see carve()
    C *dw_ih, *dw_hh, *dw_hr, *dbias;     // sums so far
    C* dx;                                // the second direction's part
  };

  PanelShape weight_shape(int64_t K, int64_t N) const {
    const PanelShape shape = PanelShape::plain(K, N, V::size);
    return is_compute_type<C>(s_.dtype) ? in_place(shape) : shape;
  }
  static C* weight_memory(Scratch& scratch, const PanelShape& shape, const void* w) {
    return shape.ld ? static_cast<C*>(const_cast<void*>(w)) : scratch.take<C>(shape.elements());
  }

  int64_t zero_count() const { return block_ld<C>(std::max(kSlots * s_.H, std::max(s_.I, O_))); }
  bool wants_weights() const { return p_.grads[0].w_ih != nullptr; }
  int64_t time(int d, int64_t q) const { return d == 0 ? layout_.steps() - 1 - q : q; }
  int64_t past(int d, int64_t t) const { return d == 0 ? t - 1 : t + 1; }
  C* gates(int d, int64_t parity) const { return direction_[d].gates + parity * chunk_rows_ * ld_gates_; }
  C* proj(int d, int64_t parity) const { return direction_[d].proj + parity * chunk_rows_ * ld_proj_; }

  void prepare(const Member& team, int d) const {
    const Direction& x = direction_[d];
    const DirectionWeights& w = p_.weights[d];
    int64_t task = 0;
    const auto mine = [&] { return task++ % team.size == team.rank; };
    for (int64_t p = 0; !hh_.ld && p < hh_.count(); ++p)
      if (mine()) pack_panel_matrix<C>(hh_, p, s_.dtype, w.w_hh, x.hh);
    for (int64_t p = 0; x.ih && !ih_.ld && p < ih_.count(); ++p)
      if (mine()) pack_panel_matrix<C>(ih_, p, s_.dtype, w.w_ih, x.ih);
    for (int64_t p = 0; s_.P && !hr_.ld && p < hr_.count(); ++p)
      if (mine()) pack_panel_matrix<C>(hr_, p, s_.dtype, w.w_hr, x.hr);
    if (!wants_weights() || layout_.steps() > 0) return;  // else the first chunk writes them
    const auto clear = [&](C* sum, int64_t n) {
      int64_t begin, end;
      team.share(n, 1024, &begin, &end);
      std::fill(sum + begin, sum + end, C(0));
    };
    clear(x.dw_ih, G_ * s_.I);
    clear(x.dw_hh, G_ * O_);
    clear(x.dw_hr, s_.P * s_.H);
    clear(x.dbias, kSlots * s_.H);
  }

  void number_rows(int d, int64_t q, int64_t count) {
    Direction& x = direction_[d];
    const SequenceSubset all(layout_, 0, 1);
    int64_t row = 0, alive = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t t = time(d, q + k);
      alive = all.alive(t, alive);
      x.first[k] = row;
      for (int64_t i = 0; i < alive; ++i, ++row)
        x.rows[row] = {t, all.sequence(i), d == 0 ? t == 0 : t == all.length(i) - 1};
    }
    x.row_count = row;
  }

  // The steps, for one member's sequences and units.
  struct Walk {
    const Backward& f;
    const Direction& x;
    Member member;
    SequenceSubset subset;
    int d;
    // The step before this one: where its gate gradients lie, and how many sequences it had.
    const C* next_gates = nullptr;
    int64_t next_alive = 0;
    bool to_and_fro = false;         // see Forward
    const Row* step_rows = nullptr;  // this step's, null outside of it

    const LayerShape& s() const { return f.s_; }
    int64_t state(int64_t i, int64_t features) const { return (d * s().B + subset.sequence(i)) * features; }
    C* carry(int64_t i) const { return x.carry + subset.global(i) * f.ld_unit_; }
    // Row of the i-th sequence relative to its step's first row.
    int64_t in_step(int64_t i) const { return subset.global(i); }

    // Sequences without a step hand the gradients of their last state to the first.
    void begin() const {
      int64_t begin, end;
      member.share(subset.count, 1, &begin, &end);
      for (int64_t i = begin; i < end; ++i) {
        if (subset.length(i) > 0) continue;
        copy_state(f.p_.dh0, f.p_.dh_n, state(i, f.O_), f.O_);
        copy_state(f.p_.dc0, f.p_.dc_n, state(i, s().H), s().H);
      }
    }

    void copy_state(void* to, const void* from, int64_t at, int64_t n) const {
      if (!to) return;
      void* here = advance(to, s().dtype, at);
      if (from) {
        std::memcpy(here, advance(from, s().dtype, at), n * item_size(s().dtype));
      } else {
        std::memset(here, 0, n * item_size(s().dtype));
      }
    }

    // True if the gradient of the state between this step and the one after it is cut.
    bool cut(int64_t i, int64_t t) const {
      if (f.p_.bptt_steps <= 0) return false;
      const int64_t next_step = d == 0 ? t + 1 : subset.length(i) - t;
      return next_step % f.p_.bptt_steps == 0;
    }

    void step(int64_t q, int64_t k, int64_t parity) {
      const int64_t t = f.time(d, q), alive = subset.alive(t, next_alive), first = x.first[k];
      leave(alive);
      step_rows = x.rows + first;
      if (s().P) {
        recurrent(t, alive, first, [&](int64_t i, int64_t row, int64_t j, int n, V dh) {
          V total = dh + incoming(i, t, j, n);
          total.store(f.proj(d, parity) + row * f.ld_proj_ + j);
        });
        member.sync();
        through_projection(alive, first, parity);
      } else {
        recurrent(t, alive, first, [&](int64_t i, int64_t row, int64_t j, int n, V dh) {
          cell(i, row, parity, j, n, dh + incoming(i, t, j, n));
        });
      }
      next_gates = f.gates(d, parity) + first * f.ld_gates_;
      next_alive = alive;
      to_and_fro = !to_and_fro;
      step_rows = nullptr;
    }

    void finish() { leave(0); }

    bool is_joining(int64_t i) const { return i >= next_alive; }

    // What reaches h of step t from outside the recurrence.
    DLK_INLINE V incoming(int64_t i, int64_t t, int64_t j, int n) const {
      V sum = V::zero();
      if (f.p_.dy.data)
        sum = load_any<C>(s().dtype, f.p_.dy.data, f.layout_.at(f.p_.dy, t, subset.sequence(i)) + d * f.O_ + j, n);
      if (is_joining(i)) {
        if (f.p_.dh_n) sum = sum + load_any<C>(s().dtype, f.p_.dh_n, state(i, f.O_) + j, n);
      } else if constexpr (Cell::kDirectPath) {
        if (!cut(i, t)) sum = sum + V::load(carry(i) + j);
      }
      return sum;
    }

    // use(i, row, column, n, dgates(next) W_hh) for all `alive` sequences and this member's columns.
    template <class Use>
    void recurrent(int64_t t, int64_t alive, int64_t first, Use use) const {
      products(
          0, alive, [&](int64_t i) { return is_joining(i) || cut(i, t); },
          [&](int64_t i, int64_t j, int n, V dh) { use(i, first + in_step(i), j, n, dh); });
    }

    // sink(i, column, n, dgates(next) W_hh) for sequences [begin, end); skip(i): zero instead.
    template <class Skip, class Sink>
    DLK_INLINE void products(int64_t begin, int64_t end, Skip skip, Sink sink) const {
      const PanelShape& shape = f.hh_;
      const int64_t H = s().H, head = Cell::kDirectPath ? 2 * H : f.G_;
      TileBuffer<C> out;
      int64_t p0, p1;
      member.share(shape.count(), 1, &p0, &p1);
      for (int64_t turn = p0; turn < p1; ++turn) {
        const int64_t p = to_and_fro ? p1 - 1 - (turn - p0) : turn;
        const int vectors = shape.vectors_in(p), height = tile_rows(vectors), width = vectors * V::size;
        const int64_t ldb = shape.stride(p);
        const C* panel = x.hh + shape.offset(p);
        for (int64_t i0 = begin; i0 < end; i0 += height) {
          const int rows = static_cast<int>(std::min<int64_t>(height, end - i0));
          const C *a[8], *tail[8];
          bool any = false;
          for (int r = 0; r < rows; ++r) {
            const bool zero = skip(i0 + r);
            any |= !zero;
            a[r] = zero ? f.zeros_ : next_gates + in_step(i0 + r) * f.ld_gates_;
            tail[r] = zero ? f.zeros_ : a[r] + 3 * H;
            fetch(i0 + r, shape.column(p, 0), vectors);
          }
          if (any) {
            run_tile<C>(rows, vectors, a, head, panel, ldb, out.data, false);
            // gru: r and z, then n's hidden half, which lies behind its input half.
            if constexpr (Cell::kDirectPath)
              run_tile<C>(rows, vectors, tail, H, panel + head * ldb, ldb, out.data, true);
          } else {
            std::fill_n(out.data, rows * width, C(0));
          }
          for (int r = 0; r < rows; ++r)
            for (int v = 0; v < vectors; ++v)
              sink(i0 + r, shape.column(p, v), shape.valid(p, v), V::load(out.data + r * width + v * V::size));
        }
      }
    }

    // What the cell will want of this step's sequence i for the units from j on.
    DLK_INLINE void fetch(int64_t i, int64_t j, int vectors) const {
      if (Cell::kSaved == 0 || s().P || !step_rows) return;
      const Row& at = step_rows[in_step(i)];
      const C* saved =
          static_cast<const C*>(f.p_.saved) + (d * s().rows + f.layout_.row(at.t, at.b)) * (Cell::kSaved * s().H) + j;
      for (int k = 0; k < Cell::kSaved; ++k)
        for (int v = 0; v < vectors; ++v) __builtin_prefetch(saved + k * s().H + v * V::size);
    }

    void through_projection(int64_t alive, int64_t first, int64_t parity) const {
      const C* dproj = f.proj(d, parity);
      const auto row = [&](int64_t i) { return dproj + (first + in_step(i)) * f.ld_proj_; };
      int64_t p0, p1;
      member.share(f.hr_.count(), 1, &p0, &p1);
      const C* dgates = f.gates(d, parity);
      gemm(
          0, alive, p0, p1, DirectRows<C, decltype(row)>{row}, f.hr_, x.hr,
          [&](int64_t i, int64_t j) -> const void* { return dgates + (first + in_step(i)) * f.ld_gates_ + j; },
          [&](int64_t i, int64_t j, V dh, int n) { cell(i, first + in_step(i), parity, j, n, dh); });
    }

    // The cell's backward for n units from j on; dh is the whole gradient of its output.
    DLK_INLINE void cell(int64_t i, int64_t row, int64_t parity, int64_t j, int n, V dh) const {
      const Row& at = x.rows[row];
      const int64_t H = s().H, saved_row = d * s().rows + f.layout_.row(at.t, at.b);
      V saved[Cell::kSaved + 1], dgates[kSlots];
      const C* from = static_cast<const C*>(f.p_.saved) + saved_row * Cell::kSaved * H;
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load_part(from + k * H + j, n);
      if constexpr (Cell::kCellState) {
        V previous = V::zero(), dc = V::zero();
        if (!at.first) {
          const int64_t past = d * s().rows + f.layout_.row(f.past(d, at.t), at.b);
          previous = load_part(static_cast<const C*>(f.p_.saved) + (past * Cell::kSaved + 4) * H + j, n);
        } else if (f.p_.c0) {
          previous = load_any<C>(s().dtype, f.p_.c0, state(i, H) + j, n);
        }
        if (is_joining(i)) {
          if (f.p_.dc_n) dc = load_any<C>(s().dtype, f.p_.dc_n, state(i, H) + j, n);
        } else if (!cut(i, at.t)) {
          dc = V::load(carry(i) + j);
        }
        const V out = Cell::backward(saved, previous, dh, &dc, dgates);
        dc.store(carry(i) + j);
        if (s().P) out.store(x.cell_out + row * f.ld_unit_ + j);
      } else if constexpr (Cell::kDirectPath) {
        Cell::backward(saved, past_h(at, i, j, n), dh, dgates).store(carry(i) + j);
      } else {
        const V y = load_any<C>(s().dtype, f.p_.y.data, f.layout_.at(f.p_.y, at.t, at.b) + d * f.O_ + j, n);
        dgates[0] = Cell::backward(y, dh);
      }
      C* to = f.gates(d, parity) + row * f.ld_gates_ + j;
      for (int k = 0; k < kSlots; ++k) store_part(to + k * H, dgates[k], n);
    }

    DLK_INLINE V past_h(const Row& at, int64_t i, int64_t j, int n) const {
      if (!at.first)
        return load_any<C>(s().dtype, f.p_.y.data, f.layout_.at(f.p_.y, f.past(d, at.t), at.b) + d * f.O_ + j, n);
      return f.p_.h0 ? load_any<C>(s().dtype, f.p_.h0, state(i, f.O_) + j, n) : V::zero();
    }

    // Sequences whose first step is behind us: what is left is the gradient of h0, c0.
    void leave(int64_t alive) const {
      if (alive >= next_alive) return;
      if (f.p_.dh0) {
        products(
            alive, next_alive, [](int64_t) { return false; },
            [&](int64_t i, int64_t j, int n, V dh) {
              if constexpr (Cell::kDirectPath) dh = dh + V::load(carry(i) + j);
              store_any<C>(s().dtype, f.p_.dh0, state(i, f.O_) + j, dh, n);
            });
      }
      if (f.p_.dc0 && member.rank == 0) {
        for (int64_t i = alive; i < next_alive; ++i)
          store_row(s().dtype, advance(f.p_.dc0, s().dtype, state(i, s().H)), s().H, carry(i));
      }
    }
  };

  // dx, weight gradients and gate gradients of the rows of one chunk.
  void chunk_products(const Member& team, int worker, int d, int64_t parity, bool first) {
    const Direction& x = direction_[d];
    const int64_t rows = x.row_count, H = s_.H;
    C* dgates = gates(d, parity);
    copy_gate_grads(team, d, parity, rows);
    if (p_.dx.data) {
      const auto row = [&](int64_t r) { return dgates + r * ld_gates_; };
      const GemmShare share(team, rows, ih_);
      const auto out = [&](int64_t r, int64_t j) -> const void* {
        const Row& to = x.rows[r];
        if (d == 1) return x.dx + layout_.row(to.t, to.b) * s_.I + j;
        return advance(p_.dx.data, s_.dtype, layout_.at(p_.dx, to.t, to.b) + j);
      };
      gemm(share.m0, share.m1, share.p0, share.p1, DirectRows<C, decltype(row)>{row}, ih_, x.ih, out,
           [&](int64_t r, int64_t j, V value, int n) {
             if (d == 1) {
               value.store(x.dx + layout_.row(x.rows[r].t, x.rows[r].b) * s_.I + j, n);
             } else {
               store_any<C>(s_.dtype, p_.dx.data, layout_.at(p_.dx, x.rows[r].t, x.rows[r].b) + j, value, n);
             }
           });
    }
    if (!wants_weights()) return;

    const PanelShape xs = PanelShape::plain(rows, s_.I, V::size), hs = PanelShape::plain(rows, O_, V::size),
                     os = PanelShape::plain(s_.P ? rows : 0, H, V::size);
    int64_t task = 0;
    const auto mine = [&] { return task++ % team.size == team.rank; };
    for (int64_t p = 0; p < xs.count(); ++p)
      if (mine()) pack_panel_rows<C>(xs, p, s_.dtype, [&](int64_t r) { return x_row(d, x.rows[r]); }, x.x_panels);
    for (int64_t p = 0; p < hs.count(); ++p)
      if (mine()) pack_panel_rows<C>(hs, p, s_.dtype, [&](int64_t r) { return past_h_row(d, x.rows[r]); }, x.h_panels);
    for (int64_t p = 0; s_.P && p < os.count(); ++p)
      if (mine())
        pack_panel_rows<C>(
            os, p, std::is_same_v<C, double> ? DType::f64 : DType::f32,
            [&](int64_t r) -> const void* { return x.cell_out + r * ld_unit_; }, x.out_panels);
    team.sync();

    const auto add = [&](const C* left, int64_t left_ld, int64_t M, const PanelShape& shape, const C* panels, C* sum) {
      int64_t begin, end;
      team.share(M, 24, &begin, &end);
      const TransposedRows<C> a{left, left_ld, rows, block_ld<C>(rows), block_[worker]};
      gemm(
          begin, end, 0, shape.count(), a, shape, panels,
          [&](int64_t m, int64_t j) -> const void* { return sum + m * shape.N + j; },
          [&](int64_t m, int64_t j, V value, int n) {
            C* to = sum + m * shape.N + j;
            store_part(to, first ? value : load_part(to, n) + value, n);
          });
    };
    add(dgates, ld_gates_, G_, xs, x.x_panels, x.dw_ih);
    if constexpr (Cell::kDirectPath) {
      add(dgates, ld_gates_, 2 * H, hs, x.h_panels, x.dw_hh);
      add(dgates + 3 * H, ld_gates_, H, hs, x.h_panels, x.dw_hh + 2 * H * O_);
    } else {
      add(dgates, ld_gates_, G_, hs, x.h_panels, x.dw_hh);
    }
    if (s_.P) add(proj(d, parity), ld_proj_, s_.P, os, x.out_panels, x.dw_hr);

    int64_t begin, end;
    team.share(kSlots * H, V::size, &begin, &end);
    for (int64_t j = begin; j < end; j += V::size) {
      const int n = static_cast<int>(std::min<int64_t>(V::size, end - j));
      V sum = V::zero();
      for (int64_t r0 = 0; r0 < rows; r0 += kBiasRows) {
        V part = V::zero();
        for (int64_t r = r0; r < std::min(rows, r0 + kBiasRows); ++r)
          part = part + load_part(dgates + r * ld_gates_ + j, n);
        sum = sum + part;
      }
      store_part(x.dbias + j, first ? sum : load_part(x.dbias + j, n) + sum, n);
    }
  }

  const void* x_row(int, const Row& row) const { return advance(p_.x.data, s_.dtype, layout_.at(p_.x, row.t, row.b)); }

  // h before the row's step.
  const void* past_h_row(int d, const Row& row) const {
    if (!row.first) return advance(p_.y.data, s_.dtype, layout_.at(p_.y, past(d, row.t), row.b) + d * O_);
    return p_.h0 ? advance(p_.h0, s_.dtype, (d * s_.B + row.b) * O_) : zeros_;
  }

  void copy_gate_grads(const Member& team, int d, int64_t parity, int64_t rows) const {
    if (!p_.gate_grads) return;
    int64_t begin, end;
    team.share(rows, 1, &begin, &end);
    for (int64_t r = begin; r < end; ++r) {
      const Row& row = direction_[d].rows[r];
      const int64_t to = d * s_.rows + layout_.row(row.t, row.b), n = kSlots * s_.H;
      std::memcpy(static_cast<C*>(p_.gate_grads) + to * n, gates(d, parity) + r * ld_gates_, n * sizeof(C));
      if (p_.proj_grads)
        std::memcpy(static_cast<C*>(p_.proj_grads) + to * s_.P, proj(d, parity) + r * ld_proj_, s_.P * sizeof(C));
    }
  }

  void store_weight_grads(const Member& team, int d) const {
    if (!wants_weights()) return;
    const Direction& x = direction_[d];
    const DirectionGrads& to = p_.grads[d];
    const auto store = [&](void* out, const C* sum, int64_t n) {
      int64_t begin, end;
      team.share(n, 1024, &begin, &end);
      if (out && out != sum && begin < end)
        store_row(s_.dtype, advance(out, s_.dtype, begin), end - begin, sum + begin);
    };
    store(to.w_ih, x.dw_ih, G_ * s_.I);
    store(to.w_hh, x.dw_hh, G_ * O_);
    store(to.w_hr, x.dw_hr, s_.P * s_.H);
    store(to.b_ih, x.dbias, G_);
    if constexpr (Cell::kDirectPath) {
      store(to.b_hh, x.dbias, 2 * s_.H);
      if (to.b_hh) store(advance(to.b_hh, s_.dtype, 2 * s_.H), x.dbias + 3 * s_.H, s_.H);
    } else {
      store(to.b_hh, x.dbias, G_);
    }
  }

  const BackwardParams& p_;
  const LayerShape& s_;
  const Plan& plan_;
  const SequenceLayout& layout_;
  const int64_t O_, G_, chunk_, chunk_rows_, ld_gates_, ld_unit_, ld_proj_;
  const PanelShape hh_, ih_, hr_;
  C* zeros_ = nullptr;
  Direction direction_[2] = {};
  C* block_[kMaxMembers] = {};
};
