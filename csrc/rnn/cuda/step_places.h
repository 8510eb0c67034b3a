// Where the rows of one step are in the memory of a whole call.
#pragma once

#include <type_traits>
#include <vector>

#include "cell.h"

namespace dlk {

// Packed rows follow each other without gaps, padded rows at distances of `b`.
class StepPlaces {
 public:
  StepPlaces(const int64_t* batch_sizes, int T, int B) : packed_(batch_sizes), T_(T), B_(B) {
    first_.push_back(0);
    for (int t = 0; packed_ && t < T; ++t) first_.push_back(first_.back() + batch_sizes[t]);
  }
  bool has(int t) const { return t >= 0 && t < T_; }
  // First row of step t among time-major rows without gaps.
  int64_t row(int t) const { return packed_ ? first_[static_cast<size_t>(t)] : static_cast<int64_t>(t) * B_; }

  // The step's rows from `feature` on, in items of `size` bytes.
  template <class To, class From>
  StateRows<To> rows(const RowTensor<From>& tensor, int t, int64_t feature, int size, bool f32) const {
    if (!tensor.data || !has(t)) return {nullptr, 0, f32};
    const int64_t begin = (packed_ ? row(t) : t) * tensor.t + feature;
    using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<To>>, const char, char>;
    return {reinterpret_cast<To>(reinterpret_cast<Bytes*>(tensor.data) + begin * size), packed_ ? tensor.t : tensor.b,
            f32};
  }
  template <class Float>
  StateRows<Float*> records(Float* data, int t, int64_t features) const {
    if (!data || !has(t)) return {nullptr, 0, true};
    return {data + row(t) * features, features, true};
  }

 private:
  const int64_t* packed_;
  int T_, B_;
  std::vector<int64_t> first_;
};

// The address so many bytes behind `data`; null stays null.
template <class Pointer>
Pointer at(Pointer data, int64_t bytes) {
  using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return data ? static_cast<Pointer>(static_cast<Bytes*>(data) + bytes) : nullptr;
}

}  // namespace dlk
