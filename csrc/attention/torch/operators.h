// The attention operators on the CPU: check, allocate, fill the structs of attention_params.h,
// call the kernel. Arguments and results are those of the schemas in ../attention_ops.cpp.
#pragma once

#include <tuple>
#include <vector>

#include "attention/params.h"
#include "torch/tensor.h"

namespace dlk {

// o, lse, stats: [B, H, 2, M] or [H, 2, rows], what the backward is to get. o lies in memory as q does, unless
// `contiguous` is asked for or q's layout does not serve.
std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
                                             const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
                                             const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                                             int64_t causal, int64_t window_left, int64_t window_right, double softcap,
                                             double dropout_p, bool contiguous);

// [dq, dk, dv, dmask, dslopes, dsinks], of shape [0] where not wanted.
std::vector<Tensor> attention_gradients(const Tensor& grad_o, const OptionalTensor& grad_lse, const Tensor& q,
                                        const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& stats,
                                        const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
                                        const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
                                        const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng,
                                        int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                                        int64_t causal, int64_t window_left, int64_t window_right, double softcap,
                                        double dropout_p, bool need_q, bool need_kv, bool need_mask, bool need_slopes,
                                        bool need_sinks);

// [B, H, rows, cols] of the compute type.
Tensor attention_picture(const Tensor& q, const Tensor& k, const OptionalTensor& mask,
                         const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
                         int64_t causal, int64_t window_left, int64_t window_right, double softcap, int64_t rows,
                         int64_t cols);

// The shape of this thread's last call that reached a kernel, or null.
const AttentionShape* last_attention_shape();

}  // namespace dlk
