// The gradient of an additive mask, summed to the mask's own shape tile by tile.
//
// If the mask is broadcast neither over queries nor over keys, each tile is added to its elements, which only one task
// changes (AttentionTasks::of_keys). If heads do not share them either, each element belongs to one tile, which is
// stored without reading the elements or filling them with zeros before. If the mask is broadcast over queries or keys,
// the sums of each head go to `parts`, whose size is linear in the lengths, and are added up in order at the end.
#pragma once

#include "attention/cpu/scores.h"

DLK_ISA_BEGIN

template <class C>
class MaskGradientSums {
 public:
  using V = Vec<C>;

  MaskGradientSums(const AttentionBackwardParams& params, const AttentionPlan& plan)
      : g_(params.dmask), in_(params.in), s_(params.in.shape), splits_(plan.splits) {}

  bool wanted() const { return g_.data != nullptr; }
  bool per_element() const { return g_.i != 0 && g_.j != 0; }

  void carve(Scratch& scratch) {
    if (!wanted()) return;
    if (per_element()) {
      const bool shared = (g_.b == 0 && s_.B > 1) || (g_.h == 0 && s_.H > 1);
      const DType dtype = in_.mask.dtype;
      once_ = !shared && (is_compute_type<C>(dtype) || dtype == s_.dtype);
      if (once_) return;
      // Sums over several heads are not rounded to 16 bits in between.
      sums_ = is_compute_type<C>(dtype) ? static_cast<C*>(g_.data) : scratch.take<C>(g_.elements);
      return;
    }
    part_count_ = s_.B * s_.H * (g_.j ? s_.N : splits_ * (g_.i ? s_.M : 1));
    parts_ = scratch.take<C>(part_count_);
    totals_ = scratch.take<double>(g_.elements);
  }
  void begin() {
    if (sums_) std::fill_n(sums_, g_.elements, C(0));
    if (parts_) std::fill_n(parts_, part_count_, C(0));
    if (totals_) std::fill_n(totals_, g_.elements, 0.0);
  }

  // Adds a tile of gradients of the scores, [keys][ld].
  void add(const Lanes<C>& lanes, const ScoreTile<C>& tile, const C* ds, int64_t split) const {
    if (per_element()) {
      add_elements(lanes, tile, ds);
    } else if (g_.j) {
      add_keys(lanes, tile, ds);
    } else {
      add_rows(lanes, tile, ds, split);
    }
  }

  // Stores zeros for the keys [first, end), which a panel does not see.
  void hide(const Lanes<C>& lanes, const LanePanel& panel, int64_t first, int64_t end) const {
    if (!once_ || first >= end) return;
    const int64_t size = item_size(in_.mask.dtype);
    for (int64_t lane = panel.lane; lane < panel.lane + panel.rows; ++lane)
      std::memset(static_cast<char*>(g_.data) + (row_of(lanes, lane) + first) * size, 0,
                  static_cast<size_t>((end - first) * size));
  }

  // Runs once, after all tasks.
  void finish() const {
    if (!wanted() || once_) return;
    if (per_element()) {
      if (sums_ == g_.data) return;
      for (int64_t i = 0; i < g_.elements; ++i) store(i, sums_[i]);
      return;
    }
    const int64_t per_head = part_count_ / std::max<int64_t>(1, s_.B * s_.H);
    const int64_t length = g_.j ? s_.N : g_.i ? s_.M : 1;
    for (int64_t b = 0; b < s_.B; ++b)
      for (int64_t h = 0; h < s_.H; ++h)
        for (int64_t at = 0; at < per_head; ++at)
          totals_[b * g_.b + h * g_.h + at % length] += static_cast<double>(parts_[(b * s_.H + h) * per_head + at]);
    for (int64_t e = 0; e < g_.elements; ++e) store(e, static_cast<C>(totals_[e]));
  }

 private:
  const MaskGradient& g_;
  const AttentionInputs& in_;
  const AttentionShape& s_;
  int64_t splits_;
  int64_t part_count_ = 0;
  bool once_ = false;         // each element belongs to one tile
  C* sums_ = nullptr;         // [elements]: the gradient itself if it has the compute type
  C* parts_ = nullptr;        // [B * H][N], or [splits][M or 1] each
  double* totals_ = nullptr;  // [elements]

  void store(int64_t at, C value) const {
    const DType dtype = in_.mask.dtype;
    if (std::is_same_v<C, double> && dtype == DType::f32) {
      static_cast<float*>(g_.data)[at] = static_cast<float>(value);
    } else {
      store_any<C>(dtype, g_.data, at, V::set1(value), 1);
    }
  }

  int64_t row_of(const Lanes<C>& lanes, int64_t lane) const {
    return lanes.b * g_.b + lanes.head[lane] * g_.h + lanes.query[lane] * g_.i;
  }

  void add_elements(const Lanes<C>& lanes, const ScoreTile<C>& tile, const C* ds) const {
    for (int64_t l = 0; l < tile.panel->rows; l += V::size) {
      const int rows = static_cast<int>(std::min<int64_t>(V::size, tile.panel->rows - l));
      int64_t row[V::size] = {};
      for (int r = 0; r < rows; ++r) row[r] = row_of(lanes, tile.panel->lane + l + r) + tile.first;
      for (int64_t j = 0; j < tile.keys; j += V::size) {
        const int keys = static_cast<int>(std::min<int64_t>(V::size, tile.keys - j));
        V block[V::size];
        if (keys == V::size) {
          DLK_UNROLL
          for (int c = 0; c < V::size; ++c) block[c] = V::load(ds + (j + c) * tile.ld + l);
        } else {
          for (int c = 0; c < V::size; ++c) block[c] = c < keys ? V::load(ds + (j + c) * tile.ld + l) : V::zero();
        }
        transpose(block);
        for (int r = 0; r < rows; ++r) {
          if (once_) {
            store_any<C>(in_.mask.dtype, g_.data, row[r] + j, block[r], keys);
          } else {
            store_part(sums_ + row[r] + j, load_part(sums_ + row[r] + j, keys) + block[r], keys);
          }
        }
      }
    }
  }

  C* part(const Lanes<C>& lanes, int64_t lane) const {
    const int64_t heads = std::max<int64_t>(1, s_.B * s_.H);
    return parts_ + (lanes.b * s_.H + lanes.head[lane]) * (part_count_ / heads);
  }

  void add_keys(const Lanes<C>& lanes, const ScoreTile<C>& tile, const C* ds) const {
    const LanePanel& panel = *tile.panel;
    const bool one_head = lanes.head[panel.lane] == lanes.head[panel.lane + panel.rows - 1];
    for (int64_t j = 0; j < tile.keys; ++j) {
      const C* row = ds + j * tile.ld;
      if (one_head) {
        V sum = V::zero();
        for (int64_t l = 0; l < panel.rows; l += V::size)
          sum = sum + load_part(row + l, static_cast<int>(std::min<int64_t>(V::size, panel.rows - l)));
        part(lanes, panel.lane)[tile.first + j] += hsum(sum);
      } else {
        for (int64_t l = 0; l < panel.rows; ++l) part(lanes, panel.lane + l)[tile.first + j] += row[l];
      }
    }
  }

  void add_rows(const Lanes<C>& lanes, const ScoreTile<C>& tile, const C* ds, int64_t split) const {
    const LanePanel& panel = *tile.panel;
    for (int64_t l = 0; l < panel.rows; l += V::size) {
      V sum = V::zero();
      for (int64_t j = 0; j < tile.keys; ++j) sum = sum + V::load(ds + j * tile.ld + l);
      alignas(64) C sums[V::size];
      sum.store(sums);
      for (int64_t r = 0; r < std::min<int64_t>(V::size, panel.rows - l); ++r) {
        const int64_t lane = panel.lane + l + r;
        part(lanes, lane)[g_.i ? split * s_.M + lanes.query[lane] : split] += sums[r];
      }
    }
  }
};

DLK_ISA_END
