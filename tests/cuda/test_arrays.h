// Arrays of every dtype that the kernels read and write, which the tests access as doubles.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "../native/naive_storage.h"

namespace dlk {

using Values = std::vector<double>;

// An array of f32, bf16 or f16. It is allocated with exactly its size, so that the address sanitizer reports every
// access beyond it, and all its bytes are 0xff (NaN) until they are written.
class Array {
 public:
  Array() = default;
  Array(DType dtype, size_t count) : dtype_(dtype), count_(count), bytes_(new char[count * item()]) {
    std::memset(bytes_.get(), 0xff, count * item());
  }
  Array(DType dtype, const Values& values) : Array(dtype, values.size()) {
    if (values.empty()) bytes_ = nullptr;
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  size_t item() const { return dtype_ == DType::f64 ? 8 : dtype_ == DType::f32 ? 4 : 2; }
  DType dtype() const { return dtype_; }
  size_t count() const { return count_; }
  void* data() const { return bytes_.get(); }
  double operator[](size_t i) const { return naive::load(data(), static_cast<int64_t>(i), dtype_); }
  void set(size_t i, double value) { naive::store(data(), static_cast<int64_t>(i), dtype_, value); }
  Values values() const {
    Values all(count_);
    for (size_t i = 0; i < count_; ++i) all[i] = (*this)[i];
    return all;
  }

 private:
  DType dtype_ = DType::f32;
  size_t count_ = 0;
  std::unique_ptr<char[]> bytes_;
};

inline double rounded(DType dtype, double value) {
  Array one(dtype, 1);
  one.set(0, value);
  return one[0];
}

}  // namespace dlk
