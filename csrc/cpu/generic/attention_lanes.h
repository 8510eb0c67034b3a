// A task's rows, one lane each, in panels of a few vectors; and the way of a tensor's rows into
// lanes ([width][lanes]) and back.

struct LanePanel {
  int64_t lane;  // the first
  int vectors;
  int64_t rows;  // real lanes
  // Over the lanes: keys [first_begin, last_end) concern some of them, [last_begin, first_end) all.
  int64_t first_begin, last_begin, first_end, last_end;
};

// The panels of a task. Lanes beyond the last row repeat it; nothing of them is stored.
template <class C>
struct Lanes {
  static constexpr int kPanelVectors = 3;
  static constexpr int kWidth = kPanelVectors * Vec<C>::size;  // of the widest panel

  const AttentionInputs* in;
  AttentionSequence sequence;
  int64_t b, rows, count;  // count: lanes, whole vectors
  LanePanel* panel;
  int64_t panels;
  int64_t *query, *head, *begin, *end;  // of each lane: i, h, and the keys that it may see
  C *position, *slope;
  uint32_t *counter_row, *counter_head;  // for dropout, with room for whole Words

  static int64_t lanes_for(int64_t rows) {
    constexpr int64_t kSize = Vec<C>::size;
    return (rows + kSize - 1) / kSize * kSize;
  }

  void carve(Scratch& scratch, int64_t rows_at_most) {
    const int64_t n = lanes_for(rows_at_most) + Words::size;
    panel = scratch.take<LanePanel>(n / Vec<C>::size + 1);
    query = scratch.take<int64_t>(n);
    head = scratch.take<int64_t>(n);
    begin = scratch.take<int64_t>(n);
    end = scratch.take<int64_t>(n);
    position = scratch.take<C>(n);
    slope = scratch.take<C>(n);
    counter_row = scratch.take<uint32_t>(n);
    counter_head = scratch.take<uint32_t>(n);
  }

  // Rows [first, first + n) of those that share the keys of kv_head.
  void set(const AttentionInputs& inputs, int64_t batch, int64_t kv_head, int64_t first, int64_t n) {
    in = &inputs;
    sequence = AttentionSequence(inputs, batch);
    b = batch, rows = n, count = lanes_for(n);
    const AttentionShape& s = inputs.shape;
    int64_t i = first % sequence.M, h = kv_head * s.group() + first / sequence.M;
    for (int64_t l = 0; l < count + Words::size; ++l) {
      query[l] = i, head[l] = h;
      const AttentionSequence::Range keys = sequence.keys(inputs, i);
      begin[l] = keys.begin, end[l] = keys.end;
      position[l] = static_cast<C>(sequence.position(inputs, i));
      slope[l] = inputs.slopes ? static_cast<C>(inputs.slopes[batch * inputs.slopes_b + h]) : C(0);
      counter_row[l] = static_cast<uint32_t>(i);
      counter_head[l] = static_cast<uint32_t>(batch * s.H + h);
      if (l + 1 < n && ++i == sequence.M) i = 0, ++h;
    }
    cut();
  }

  const void* row_of(const HeadTensor<const void*>& t, DType dtype, int64_t lane) const {
    return advance(t.data, dtype, offset(t, lane));
  }
  template <class Pointer>
  int64_t offset(const HeadTensor<Pointer>& t, int64_t lane) const {
    return (in->cu_q ? sequence.q0 * t.row : b * t.b) + head[lane] * t.h + query[lane] * t.row;
  }

 private:
  // Panels of nearly the same width.
  void cut() {
    constexpr int64_t kSize = Vec<C>::size;
    const int64_t vectors = count / kSize;
    panels = (vectors + kPanelVectors - 1) / kPanelVectors;
    for (int64_t p = 0; p < panels; ++p) {
      LanePanel& to = panel[p];
      const int64_t from = vectors * p / panels, until = vectors * (p + 1) / panels;
      to.lane = from * kSize;
      to.vectors = static_cast<int>(until - from);
      to.rows = std::min(rows, until * kSize) - to.lane;
      to.first_begin = to.last_begin = begin[to.lane];
      to.first_end = to.last_end = end[to.lane];
      for (int64_t l = to.lane; l < to.lane + to.rows; ++l) {
        to.first_begin = std::min(to.first_begin, begin[l]);
        to.last_begin = std::max(to.last_begin, begin[l]);
        to.first_end = std::min(to.first_end, end[l]);
        to.last_end = std::max(to.last_end, end[l]);
      }
    }
  }
};

// Where the keys' rows begin.
template <class Pointer>
DLK_INLINE int64_t key_offset(const AttentionInputs& in, const AttentionSequence& sequence,
                              const HeadTensor<Pointer>& t, int64_t b, int64_t kv_head, int64_t j) {
  return (in.cu_k ? sequence.k0 * t.row : b * t.b) + kv_head * t.h + j * t.row;
}

// Rows of a tensor into the lanes of a panel: out[x][lane], out[0] being the panel's first lane.
template <class C>
DLK_NOINLINE void rows_to_lanes(const Lanes<C>& lanes, const LanePanel& panel, const HeadTensor<const void*>& t,
                                DType dtype, int64_t width, C* out) {
  constexpr int kSize = Vec<C>::size;
  const int64_t ld = int64_t{panel.vectors} * kSize;
  for (int64_t l = 0; l < ld; l += kSize) {
    const void* row[kSize];
    const int valid = static_cast<int>(panel.rows - l < kSize ? panel.rows - l : kSize);
    for (int r = 0; r < valid; ++r) row[r] = lanes.row_of(t, dtype, panel.lane + l + r);
    for (int64_t x = 0; x < width; x += kSize) {
      const int n = static_cast<int>(width - x < kSize ? width - x : kSize);
      Vec<C> block[kSize];
      for (int r = 0; r < kSize; ++r) block[r] = r < valid ? load_any<C>(dtype, row[r], x, n) : Vec<C>::zero();
      transpose(block);
      for (int c = 0; c < n; ++c) block[c].store(out + (x + c) * ld + l);
    }
  }
}

// The way back, times factor[lane] (which may be null).
template <class C>
DLK_NOINLINE void lanes_to_rows(const Lanes<C>& lanes, const LanePanel& panel, const C* from, const C* factor,
                                const HeadTensor<void*>& t, DType dtype, int64_t width) {
  constexpr int kSize = Vec<C>::size;
  const int64_t ld = int64_t{panel.vectors} * kSize;
  for (int64_t l = 0; l < panel.rows; l += kSize) {
    const int valid = static_cast<int>(panel.rows - l < kSize ? panel.rows - l : kSize);
    const Vec<C> times = factor ? Vec<C>::load(factor + l) : Vec<C>::set1(C(1));
    for (int64_t x = 0; x < width; x += kSize) {
      const int n = static_cast<int>(width - x < kSize ? width - x : kSize);
      Vec<C> block[kSize];
      for (int c = 0; c < kSize; ++c) block[c] = c < n ? Vec<C>::load(from + (x + c) * ld + l) * times : Vec<C>::zero();
      transpose(block);
      for (int r = 0; r < valid; ++r) store_any<C>(dtype, t.data, lanes.offset(t, panel.lane + l + r) + x, block[r], n);
    }
  }
}

// Rows of keys or values in the compute type: where they lie, if that suits, else a copy.
template <class C>
struct KeyRows {
  const C* data;
  int64_t ld;
};

// Rows far apart would share cache sets.
template <class C>
DLK_INLINE bool rows_in_place(DType dtype, int64_t row_stride, int64_t width) {
  return is_compute_type<C>(dtype) && row_stride <= 2 * width;
}

template <class C>
DLK_NOINLINE KeyRows<C> read_rows(DType dtype, const void* from, int64_t row_stride, int64_t rows, int64_t width,
                                  bool in_place, C* copy) {
  if (in_place) return {static_cast<const C*>(from), row_stride};
  const int64_t ld = lanes_rounded<C>(width);
  for (int64_t r = 0; r < rows; ++r) load_row<C>(dtype, advance(from, dtype, r * row_stride), width, copy + r * ld);
  return {copy, ld};
}
