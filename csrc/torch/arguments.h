// What the operators share to turn tensors into the kernels' structs.
#pragma once

#include <vector>

#include "attention/params.h"
#include "rnn/params.h"
#include "tensor.h"

namespace dlk {

// Returns pointers to arguments in the layout that the kernels read, and owns the copies that this needs.
class Inputs {
 public:
  const void* contiguous(const Tensor& tensor) {
    if (tensor.contiguous()) return tensor.data();
    copies_.push_back(contiguous_copy(tensor));
    return copies_.back().data();
  }

  // Contiguous and aligned to a cache line, as torch allocates; a view may begin anywhere and is then copied.
  const void* aligned(const Tensor& tensor) {
    const void* data = contiguous(tensor);
    if (reinterpret_cast<uintptr_t>(data) % 64 == 0) return data;
    copies_.push_back(contiguous_copy(tensor));
    return copies_.back().data();
  }

  // Copies the tensor only if the stride of its last dimension is not 1. `t_dim` and `b_dim` are
  // the dimensions of time and batch; b_dim is -1 for packed data.
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
