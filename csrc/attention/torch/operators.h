// The attention operators on the CPU: each checks its arguments, allocates the results, fills the structs of
// attention/params.h and calls the kernels.
#pragma once

#include <tuple>
#include <vector>

#include "attention/torch/arguments.h"

namespace dlk {
namespace on_cpu {

// (o, lse, stats): [B, H, M, Dv], [B, H, M] and [B, H, 2, M], or packed [rows, H, Dv], [H, rows] and [H, 2, rows]. The
// backward needs stats. o has the strides of torch.empty_like(q), unless `contiguous` is set or those do not serve.
std::tuple<Tensor, Tensor, Tensor> attention(const AttentionForwardArguments& a);

// [dq, dk, dv, dmask, dslopes, dsinks], of shape [0] where not wanted.
std::vector<Tensor> attention_backward(const AttentionBackwardArguments& a);

// [B, H, rows, cols] of the compute type.
Tensor attention_map(const AttentionMapArguments& a);

}  // namespace on_cpu

// The shape of this thread's last call that reached a kernel, or null.
const AttentionShape* last_attention_shape();

}  // namespace dlk
