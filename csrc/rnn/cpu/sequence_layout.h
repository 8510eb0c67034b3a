// Tells which rows of a padded or packed batch are alive at each time step, and between which steps the state is reset.
// The sequences are sorted by decreasing length, so that the alive ones always come first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "rnn/params.h"

namespace dlk {

class SequenceLayout {
 public:
  SequenceLayout(const LayerShape& shape, const int64_t* batch_sizes, const int64_t* lengths, const uint8_t* resets)
      : B_(shape.B),
        batch_sizes_(batch_sizes),
        resets_(resets),
        uniform_(!batch_sizes && !lengths),
        steps_(shape.B ? shape.T : 0) {
    order(shape, batch_sizes, lengths);
    for (int64_t t = 0; resets && t < steps_; ++t) {
      const uint8_t* flags = resets + row(t, 0);
      any_reset_.push_back(std::any_of(flags, flags + (packed() ? batch_sizes[t] : B_), [](uint8_t on) { return on; }));
    }
  }

  int64_t batch() const { return B_; }
  int64_t steps() const { return steps_; }   // length of the longest sequence
  bool uniform() const { return uniform_; }  // whether all sequences are equally long
  bool packed() const { return batch_sizes_ != nullptr; }
  int64_t sequence(int64_t i) const { return uniform_ ? i : order_[i]; }      // index in the caller's batch
  int64_t length(int64_t i) const { return uniform_ ? steps_ : length_[i]; }  // of the i-th longest
  int64_t row(int64_t t, int64_t b) const { return packed() ? first_row_[t] + b : t * B_ + b; }
  // Offset of element 0 of row (t, b) in a tensor with these strides.
  template <class Pointer>
  int64_t at(const RowTensor<Pointer>& x, int64_t t, int64_t b) const {
    return packed() ? (first_row_[t] + b) * x.t : t * x.t + b * x.b;
  }

  // A flag at step t separates it from step t - 1, for both directions: the state is zero before direction 0 takes step
  // t, and before direction 1 takes step t - 1.
  bool may_reset(int d, int64_t t) const {  // whether the state of any sequence is zero before step t of direction d
    const int64_t flagged = d == 0 ? t : t + 1;
    return resets_ && flagged < steps_ && any_reset_[flagged];
  }
  bool is_reset(int d, int64_t t, int64_t i) const {  // the same of the i-th longest, which is alive at step t
    if (!may_reset(d, t)) return false;
    if (d == 0) return resets_[row(t, sequence(i))];
    return t + 1 < length(i) && resets_[row(t + 1, sequence(i))];
  }

 private:
  void order(const LayerShape& shape, const int64_t* batch_sizes, const int64_t* lengths) {
    if (uniform_) return;
    order_.resize(B_);
    length_.resize(B_);
    std::iota(order_.begin(), order_.end(), int64_t{0});
    if (batch_sizes) {
      first_row_.resize(shape.T);
      int64_t row = 0;
      for (int64_t t = 0; t < shape.T; ++t) {
        first_row_[t] = row;
        row += batch_sizes[t];
        for (int64_t b = 0; b < batch_sizes[t]; ++b) length_[b] = t + 1;
      }
    } else {
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
      for (int64_t i = 0; i < B_; ++i) length_[i] = lengths[order_[i]];
    }
    steps_ = B_ ? length_[0] : 0;
  }

  int64_t B_;
  const int64_t* batch_sizes_;
  const uint8_t* resets_;
  bool uniform_;
  int64_t steps_;
  std::vector<bool> any_reset_;  // of each step
  std::vector<int64_t> order_, length_, first_row_;
};

// Every `stride`-th sequence from `first` on: the share of one thread when the batch is
// split. Interleaved shares stay equally large as sequences end.
struct SequenceSubset {
  const SequenceLayout* layout;
  int64_t first, stride, count;

  SequenceSubset(const SequenceLayout& layout, int64_t first, int64_t stride)
      : layout(&layout), first(first), stride(stride), count((layout.batch() - first + stride - 1) / stride) {}

  int64_t global(int64_t i) const { return first + i * stride; }
  int64_t sequence(int64_t i) const { return layout->sequence(global(i)); }
  int64_t length(int64_t i) const { return layout->length(global(i)); }
  bool is_reset(int d, int64_t t, int64_t i) const { return layout->is_reset(d, t, global(i)); }
  // Number of sequences alive at time t; the search begins at `hint`, for example the number at a neighbouring step.
  int64_t alive(int64_t t, int64_t hint) const {
    if (layout->uniform()) return count;
    while (hint > 0 && length(hint - 1) <= t) --hint;
    while (hint < count && length(hint) > t) ++hint;
    return hint;
  }
};

}  // namespace dlk
