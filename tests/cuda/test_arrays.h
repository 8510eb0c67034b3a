// Arrays of every dtype that the kernels read and write, which the tests access as doubles.
#pragma once

#include <memory>
#include <vector>

#include "../native/naive_storage.h"
#include "memory.h"

namespace dlk {

using Values = std::vector<double>;

// An array of f32, bf16 or f16. It is allocated with exactly its size, so that the sanitizers report every access
// beyond it, and all its bytes are 0xff (NaN) until they are written.
class Array {
 public:
  Array() = default;
  Array(DType dtype, size_t count) : dtype_(dtype), count_(count), memory_(std::make_unique<Memory>(count * item())) {}
  Array(DType dtype, const Values& values) : Array(dtype, values.size()) {
    if (values.empty()) memory_ = nullptr;
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  size_t item() const { return dtype_ == DType::f64 ? 8 : dtype_ == DType::f32 ? 4 : 2; }
  DType dtype() const { return dtype_; }
  size_t count() const { return count_; }
  bool empty() const { return !memory_; }
  void* data() const { return memory_ ? memory_->data() : nullptr; }  // for kernels
  double operator[](size_t i) const { return naive::load(memory_->read(), static_cast<int64_t>(i), dtype_); }
  void set(size_t i, double value) { naive::store(memory_->write(), static_cast<int64_t>(i), dtype_, value); }
  void set_all_bits(size_t i) { std::memset(static_cast<char*>(memory_->write()) + i * item(), 0xff, item()); }
  Values values() const {
    Values all(count_);
    for (size_t i = 0; i < count_; ++i) all[i] = (*this)[i];
    return all;
  }

 private:
  DType dtype_ = DType::f32;
  size_t count_ = 0;
  std::unique_ptr<Memory> memory_;
};

inline double rounded(DType dtype, double value) {
  Array one(dtype, 1);
  one.set(0, value);
  return one[0];
}

}  // namespace dlk
