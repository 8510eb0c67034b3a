// Shared by the attention operators: makes the structs of attention/params.h from tensors.
#pragma once

#include "torch/checks.h"
#include "operators.h"
#include "torch/arguments.h"
#include "torch/threads.h"

namespace dlk {

// Checks the arguments of one call and holds them as the kernels read them. It owns what had to be copied or converted.
class AttentionCall {
 public:
  explicit AttentionCall(const AttentionArguments& arguments);
  AttentionCall(const AttentionCall&) = delete;
  AttentionCall& operator=(const AttentionCall&) = delete;

  AttentionInputs in{};
  int32_t dtype = 0, compute = 0;  // torch's numbers for the dtype and the compute type
  Inputs inputs;

  bool varlen() const { return packed_; }

  // [B, heads, rows, width] with the memory order [B, rows, heads, width]; or packed [rows, heads, width].
  Tensor empty_heads(int64_t heads, int64_t rows, int64_t width) const;
  Tensor empty_result(const Tensor& q, bool contiguous) const;  // o
  Tensor empty_lse() const;                                     // [B, H, M] or [H, M]
  Tensor empty_stats() const;                                   // [B, H, 2, M] or [H, 2, M]

  void check_heads(const Tensor& tensor, const char* what, int64_t heads, int64_t rows, int64_t width) const;
  void check_lse(const Tensor& tensor, const char* what) const;  // [B, H, M] or [H, M] of the compute type
  void check_stats(const Tensor& tensor) const;
  HeadTensor<const void*> read_lse(const Tensor& tensor);
  SoftmaxStatistics<const void*> read_stats(const Tensor& tensor);

  HeadTensor<void*> heads_of(const Tensor& output) const;
  HeadTensor<void*> lse_of(const Tensor& output) const;
  SoftmaxStatistics<void*> stats_of(const Tensor& output) const;

 private:
  void check_sizes(const AttentionArguments& arguments);
  void check_sequences(const AttentionArguments& arguments) const;
  void read_sequences(const AttentionArguments& arguments);
  void read_mask(const OptionalTensor& mask);
  void read_rules(const AttentionArguments& arguments);
  template <class Pointer, class Bytes>
  SoftmaxStatistics<Pointer> statistics(Bytes* data) const {
    const int64_t M = in.shape.M, H = in.shape.H, item = in.shape.dtype == DType::f64 ? 8 : 4;
    return {{data, 2 * H * M, 2 * M, 1}, {data + M * item, 2 * H * M, 2 * M, 1}};
  }

  bool packed_ = false;  // sequences follow each other, and cu_seqlens are given
  std::vector<double> slopes_, sinks_;
  std::vector<int32_t> cu_q_, cu_k_;  // copies, as another thread may write to the caller's
};

// For last_attention_shape().
void remember_attention(const AttentionShape& shape);

// Convert the elements of a CPU tensor of any of the four dtypes to doubles, and back.
std::vector<double> as_doubles(const Tensor& tensor, DType dtype, Inputs* inputs);
void from_doubles(const std::vector<double>& values, DType dtype, void* out);

}  // namespace dlk
