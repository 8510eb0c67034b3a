// The rows of a task as vector lanes, one row per lane, divided into panels as wide as strips (tile.h); and copies of a
// tensor's rows into lanes ([width][lanes]) and back, and into strips.
#pragma once

#include "attention/cpu/tile.h"
#include "attention/cpu/tasks.h"
#include "core/scratch.h"

DLK_ISA_BEGIN

struct LanePanel {
  int64_t lane;  // the first
  int vectors;
  int64_t rows;  // lanes with a row of their own
  // Some lanes may see keys of [first_begin, last_end), and all lanes see all keys of [last_begin, first_end).
  int64_t first_begin, last_begin, first_end, last_end;
};

// The panels of a task. Lanes beyond the last row repeat it, and their results are not stored.
template <class C>
struct Lanes {
  static constexpr int kWidth = 3 * Vec<C>::size;  // of the widest panel

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

  // Takes rows [first, first + n) of those that share the keys of kv_head.
  void set(const AttentionInputs& inputs, int64_t batch, int64_t kv_head, int64_t first, int64_t n) {
    in = &inputs;
    sequence = AttentionSequence(inputs, batch);
    b = batch, rows = n, count = lanes_for(n);
    const AttentionShape& s = inputs.shape;
    int64_t i = first % sequence.M, h = kv_head * s.group() + first / sequence.M;
    const bool everything = inputs.causal == Causal::none && inputs.left < 0 && inputs.right < 0;
    for (int64_t l = 0; l < count + Words::size; ++l) {
      query[l] = i, head[l] = h;
      const AttentionSequence::Range keys =
          everything ? AttentionSequence::Range{0, sequence.N} : sequence.keys(inputs, i);
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

  // Lanes beyond the last row get the statistics of a row that sees nothing.
  void read_statistics(const SoftmaxStatistics<const void*>& stats, int64_t lane, C* top, C* weight) const {
    *top = lane < rows ? static_cast<const C*>(stats.top.data)[offset(stats.top, lane)]
                       : std::numeric_limits<C>::infinity();
    *weight = lane < rows ? static_cast<const C*>(stats.weight.data)[offset(stats.weight, lane)] : C(0);
  }

 private:
  void cut() {
    constexpr int64_t kSize = Vec<C>::size;
    const int64_t vectors = count / kSize;
    panels = strips(vectors);
    for (int64_t p = 0; p < panels; ++p) {
      LanePanel& to = panel[p];
      const int64_t from = strip_begin(vectors, p), until = strip_begin(vectors, p + 1);
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

// The offset of key j.
template <class Pointer>
DLK_INLINE int64_t key_offset(const AttentionInputs& in, const AttentionSequence& sequence,
                              const HeadTensor<Pointer>& t, int64_t b, int64_t kv_head, int64_t j) {
  return (in.cu_k ? sequence.k0 * t.row : b * t.b) + kv_head * t.h + j * t.row;
}

// Writes out[i][r] = row[r][x + i] for i < n, n = 1..size, and as many rows r as a vector has lanes.
template <class C, class S>
DLK_INLINE void rows_to_lanes(const S* const* row, int64_t x, int n, C* out, int64_t ld) {
  constexpr int kSize = Vec<C>::size;
  Vec<C> block[kSize];
  if (n == kSize) {
    DLK_UNROLL
    for (int r = 0; r < kSize; ++r) block[r] = load_as<C>(row[r] + x);
    transpose(block);
    DLK_UNROLL
    for (int c = 0; c < kSize; ++c) block[c].store(out + c * ld);
  } else {
    for (int r = 0; r < kSize; ++r) block[r] = load_as<C>(row[r] + x, n);
    transpose(block);
    for (int c = 0; c < n; ++c) block[c].store(out + c * ld);
  }
}

template <class C, class S>
DLK_NOINLINE void rows_to_lanes(const Lanes<C>& lanes, const LanePanel& panel, const HeadTensor<const void*>& t,
                                int64_t width, C* out) {
  constexpr int kSize = Vec<C>::size;
  const int64_t ld = int64_t{panel.vectors} * kSize;
  for (int64_t l = 0; l < ld; l += kSize) {
    const S* row[kSize];
    for (int r = 0; r < kSize; ++r)
      row[r] = static_cast<const S*>(t.data) + lanes.offset(t, panel.lane + std::min(l + r, panel.rows - 1));
    for (int64_t x = 0; x < width; x += kSize)
      rows_to_lanes(row, x, static_cast<int>(width - x < kSize ? width - x : kSize), out + x * ld + l, ld);
  }
}

// Copies rows of a tensor into the lanes of a panel: out [width][lanes of the panel]. Lanes without a row repeat the
// last one.
template <class C>
DLK_INLINE void rows_to_lanes(const Lanes<C>& lanes, const LanePanel& panel, const HeadTensor<const void*>& t,
                              DType dtype, int64_t width, C* out) {
  if constexpr (std::is_same_v<C, double>) {
    rows_to_lanes<C, double>(lanes, panel, t, width, out);
  } else if (dtype == DType::f32) {
    rows_to_lanes<C, float>(lanes, panel, t, width, out);
  } else if (dtype == DType::bf16) {
    rows_to_lanes<C, bf16>(lanes, panel, t, width, out);
  } else {
    rows_to_lanes<C, f16>(lanes, panel, t, width, out);
  }
}

// Copies lanes back to rows of a tensor, multiplied by factor[lane].
template <class C, class S>
DLK_NOINLINE void lanes_to_rows(const Lanes<C>& lanes, const LanePanel& panel, const C* from, const C* factor,
                                const HeadTensor<void*>& t, int64_t width) {
  constexpr int kSize = Vec<C>::size;
  const int64_t ld = int64_t{panel.vectors} * kSize;
  for (int64_t l = 0; l < panel.rows; l += kSize) {
    const int valid = static_cast<int>(panel.rows - l < kSize ? panel.rows - l : kSize);
    const Vec<C> times = Vec<C>::load(factor + l);
    S* row[kSize] = {};
    for (int r = 0; r < valid; ++r) row[r] = static_cast<S*>(t.data) + lanes.offset(t, panel.lane + l + r);
    for (int64_t x = 0; x < width; x += kSize) {
      const int n = static_cast<int>(width - x < kSize ? width - x : kSize);
      const C* at = from + x * ld + l;
      Vec<C> block[kSize];
      if (n == kSize && valid == kSize) {
        DLK_UNROLL
        for (int c = 0; c < kSize; ++c) block[c] = Vec<C>::load(at + c * ld) * times;
        transpose(block);
        DLK_UNROLL
        for (int r = 0; r < kSize; ++r) store_as(row[r] + x, block[r]);
      } else {
        for (int c = 0; c < kSize; ++c) block[c] = c < n ? Vec<C>::load(at + c * ld) * times : Vec<C>::zero();
        transpose(block);
        for (int r = 0; r < valid; ++r) store_as(row[r] + x, block[r], n);
      }
    }
  }
}

template <class C>
DLK_INLINE void lanes_to_rows(const Lanes<C>& lanes, const LanePanel& panel, const C* from, const C* factor,
                              const HeadTensor<void*>& t, DType dtype, int64_t width) {
  if constexpr (std::is_same_v<C, double>) {
    lanes_to_rows<C, double>(lanes, panel, from, factor, t, width);
  } else if (dtype == DType::f32) {
    lanes_to_rows<C, float>(lanes, panel, from, factor, t, width);
  } else if (dtype == DType::bf16) {
    lanes_to_rows<C, bf16>(lanes, panel, from, factor, t, width);
  } else {
    lanes_to_rows<C, f16>(lanes, panel, from, factor, t, width);
  }
}

// Copies the lanes' rows of a tensor into strips (tile.h), one after the other, each [row][width of the strip].
template <class C>
DLK_NOINLINE void rows_to_strips(const Lanes<C>& lanes, const HeadTensor<const void*>& t, DType dtype, int64_t width,
                                 C* out) {
  constexpr int64_t kSize = Vec<C>::size;
  const int64_t vectors = lanes_rounded<C>(width) / kSize;
  for (int64_t strip = 0; strip < strips(vectors); ++strip) {
    const int64_t first = strip_begin(vectors, strip) * kSize, end = strip_begin(vectors, strip + 1) * kSize;
    for (int64_t l = 0; l < lanes.rows; ++l) {
      const void* row = lanes.row_of(t, dtype, l);
      for (int64_t x = first; x < end; x += kSize, out += kSize)
        load_any<C>(dtype, row, x, static_cast<int>(std::min(kSize, width - x))).store(out);
    }
  }
}

// Rows of keys or values in the compute type: those of the tensor, if they can be used in place, else a copy.
template <class C>
struct KeyRows {
  const C* data;
  int64_t ld;
};

// Rows that are far apart are copied, because they would share the same few sets of the cache.
template <class C>
DLK_INLINE bool rows_in_place(DType dtype, int64_t row_stride, int64_t width) {
  return is_compute_type<C>(dtype) && row_stride <= 2 * width;
}

template <class C, class S>
DLK_NOINLINE void copy_rows(const S* from, int64_t row_stride, int64_t rows, int64_t width, C* to, int64_t ld) {
  constexpr int64_t kSize = Vec<C>::size;
  for (int64_t r = 0; r < rows; ++r, from += row_stride, to += ld) {
    int64_t x = 0;
    for (; x + kSize <= width; x += kSize) load_as<C>(from + x).store(to + x);
    if (x < width) load_as<C>(from + x, static_cast<int>(width - x)).store(to + x);
  }
}

template <class C>
DLK_INLINE KeyRows<C> read_rows(DType dtype, const void* from, int64_t row_stride, int64_t rows, int64_t width,
                                bool in_place, C* copy) {
  if (in_place) return {static_cast<const C*>(from), row_stride};
  const int64_t ld = lanes_rounded<C>(width);
  if constexpr (std::is_same_v<C, double>) {
    copy_rows(static_cast<const double*>(from), row_stride, rows, width, copy, ld);
  } else if (dtype == DType::f32) {
    copy_rows(static_cast<const float*>(from), row_stride, rows, width, copy, ld);
  } else if (dtype == DType::bf16) {
    copy_rows(static_cast<const bf16*>(from), row_stride, rows, width, copy, ld);
  } else {
    copy_rows(static_cast<const f16*>(from), row_stride, rows, width, copy, ld);
  }
  return {copy, ld};
}

DLK_ISA_END
