// What the operators share on their way from tensors to structs.
#pragma once

#include <vector>

#include "attention/params.h"
#include "rnn/params.h"
#include "tensor.h"

namespace dlk {

// Pointers to arguments in the form the kernels read; owns the copies that this took.
class Inputs {
 public:
  const void* contiguous(const Tensor& tensor) {
    if (tensor.contiguous()) return tensor.data();
    copies_.push_back(contiguous_copy(tensor));
    return copies_.back().data();
  }

  // On a cache line's boundary, as torch allocates; a view may begin anywhere.
  const void* aligned(const Tensor& tensor) {
    const void* data = contiguous(tensor);
    if (reinterpret_cast<uintptr_t>(data) % 64 == 0) return data;
    copies_.push_back(contiguous_copy(tensor));
    return copies_.back().data();
  }

  // Any strides but that of the last dimension, which must be 1. `t_dim` and `b_dim` are the
  // dimensions of time and batch; b_dim is -1 for packed data.
  RowTensor<const void*> rows(const Tensor& tensor, int t_dim, int b_dim, DType dtype) {
    const Tensor& source = with_dense_rows(tensor);
    const int64_t* strides = source.strides();
    return {source.data(), strides[t_dim], b_dim < 0 ? 0 : strides[b_dim], dtype};
  }

  // The same with [B, heads, rows, width], or [rows, heads, width] of all sequences.
  HeadTensor<const void*> heads(const Tensor& tensor) {
    const Tensor& source = with_dense_rows(tensor);
    const int64_t* strides = source.strides();
    if (tensor.dim() == 3) return {source.data(), 0, strides[1], strides[0]};
    return {source.data(), strides[0], strides[1], strides[2]};
  }

 private:
  // Valid until the next call.
  const Tensor& with_dense_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    if (tensor.strides()[last] == 1 || tensor.size(last) <= 1) return tensor;
    copies_.push_back(contiguous_copy(tensor));
    return copies_.back();
  }

  std::vector<Tensor> copies_;
};

// An output, and where the kernel writes it: null when it is not wanted.
struct Output {
  Tensor tensor;
  void* data = nullptr;
};

inline Output output(bool wanted, std::initializer_list<int64_t> sizes, int32_t dtype) {
  Output out;
  if (!wanted) {
    out.tensor = absent(dtype);
  } else {
    out.tensor = empty(sizes, dtype);
    out.data = out.tensor.data();
  }
  return out;
}

}  // namespace dlk
