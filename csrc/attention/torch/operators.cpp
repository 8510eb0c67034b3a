#include <limits>

#include "boundary.h"

namespace dlk {
namespace {

// What no sequence covers: rows beyond the last one.
template <class C>
void fill_rows(const AttentionCall& call, const Tensor& lse, const Tensor& stats) {
  constexpr C kInfinity = std::numeric_limits<C>::infinity();
  const AttentionShape& s = call.in.shape;
  C *log_sum = static_cast<C*>(lse.data()), *top = static_cast<C*>(stats.data()), *weight = top + s.M;
  for (int64_t h = 0; h < s.H; ++h, log_sum += s.M, top += 2 * s.M, weight += 2 * s.M)
    for (int64_t i = call.in.cu_q[s.B]; i < s.M; ++i) log_sum[i] = -kInfinity, top[i] = kInfinity, weight[i] = 0;
}

void fill_uncovered(const AttentionCall& call, const Tensor& o, const Tensor& lse, const Tensor& stats) {
  if (!call.varlen() || call.in.cu_q[call.in.shape.B] == call.in.shape.M) return;
  fill_with_zeros(o);
  if (call.in.shape.dtype == DType::f64) {
    fill_rows<double>(call, lse, stats);
  } else {
    fill_rows<float>(call, lse, stats);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
                                             const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
                                             const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                                             int64_t causal, int64_t window_left, int64_t window_right, double softcap,
                                             double dropout_p, bool contiguous) {
  const AttentionCall call({q, k, &v, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rng, max_seqlen_q,
                            max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap, dropout_p});
  const AttentionShape& shape = call.in.shape;
  Tensor o = call.empty_result(q, contiguous);
  Tensor lse = call.empty_lse(), stats = call.empty_stats();
  fill_uncovered(call, o, lse, stats);
  if (lse.numel() > 0) {
    attention_forward({call.in, call.heads_of(o), call.lse_of(lse), call.stats_of(stats)}, current_runtime());
    remember_attention(shape);
  }
  return {std::move(o), std::move(lse), std::move(stats)};
}

std::vector<Tensor> attention_gradients(const Tensor& grad_o, const OptionalTensor& grad_lse, const Tensor& q,
                                        const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& stats,
                                        const OptionalTensor& mask, const OptionalTensor& alibi_slopes,
                                        const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
                                        const OptionalTensor& cu_seqlens_k, const OptionalTensor& rng,
                                        int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                                        int64_t causal, int64_t window_left, int64_t window_right, double softcap,
                                        double dropout_p, bool need_q, bool need_kv, bool need_mask, bool need_slopes,
                                        bool need_sinks) {
  AttentionCall call({q, k, &v, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rng, max_seqlen_q, max_seqlen_k,
                      softmax_scale, causal, window_left, window_right, softcap, dropout_p});
  const AttentionShape& s = call.in.shape;
  DLK_CHECK(!need_mask || (mask && !call.in.mask.boolean), "need_mask: there is no mask with a gradient");
  DLK_CHECK(!need_slopes || alibi_slopes, "need_slopes: there are no alibi_slopes");
  DLK_CHECK(!need_sinks || sinks, "need_sinks: there are no sinks");

  AttentionBackwardParams params{};
  call.check_heads(grad_o, "do", s.H, s.M, s.Dv);
  call.check_heads(o, "o", s.H, s.M, s.Dv);
  call.check_stats(stats);
  if (grad_lse) call.check_lse(grad_lse, "dlse");
  params.grad_o = call.inputs.heads(grad_o);
  params.o = call.inputs.heads(o);
  params.stats = call.read_stats(stats);
  if (grad_lse) params.grad_lse = call.read_lse(grad_lse);
  params.in = call.in;

  std::vector<Tensor> grads;
  const auto heads_output = [&](bool wanted, int64_t heads, int64_t rows, int64_t width, HeadTensor<void*>* into) {
    grads.push_back(wanted ? call.empty_heads(heads, rows, width) : absent(call.dtype));
    if (wanted) *into = call.heads_of(grads.back());
  };
  heads_output(need_q, s.H, s.M, s.D, &params.dq);
  heads_output(need_kv, s.Hkv, s.N, s.D, &params.dk);
  heads_output(need_kv, s.Hkv, s.N, s.Dv, &params.dv);
  if (need_mask) {
    grads.push_back(empty_like(mask));
    const Tensor& dmask = grads.back();
    const auto stride = [&](int d) { return dmask.size(d) == 1 ? int64_t{0} : dmask.strides()[d]; };
    params.dmask = {dmask.data(), dmask.numel(), stride(0), stride(1), stride(2), stride(3)};
  } else {
    grads.push_back(absent(call.dtype));
  }
  std::vector<double> dslopes(need_slopes ? static_cast<size_t>(alibi_slopes.numel()) + 1 : 0);
  std::vector<double> dsinks(need_sinks ? static_cast<size_t>(s.H) + 1 : 0);
  if (need_slopes) params.dslopes = dslopes.data();
  if (need_sinks) params.dsinks = dsinks.data();

  const bool empty_call = s.B * s.H == 0 || (s.M == 0 && s.N == 0);
  const bool uncovered = call.varlen() && (call.in.cu_q[s.B] != s.M || call.in.cu_k[s.B] != s.N);
  if (empty_call || uncovered) {
    for (const Tensor& grad : grads) fill_with_zeros(grad);
  }
  if (!empty_call) {
    attention_backward(params, current_runtime());
    remember_attention(s);
  }
  const auto small_output = [&](bool wanted, const OptionalTensor& like, std::vector<double>& values) {
    if (!wanted) {
      grads.push_back(absent(call.dtype));
      return;
    }
    values.pop_back();  // it was there for its address
    grads.push_back(empty_like(like));
    from_doubles(values, check_float(like, "gradient"), grads.back().data());
  };
  small_output(need_slopes, alibi_slopes, dslopes);
  small_output(need_sinks, sinks, dsinks);
  return grads;
}

Tensor attention_picture(const Tensor& q, const Tensor& k, const OptionalTensor& mask,
                         const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double softmax_scale,
                         int64_t causal, int64_t window_left, int64_t window_right, double softcap, int64_t rows,
                         int64_t cols) {
  const OptionalTensor none;
  AttentionCall call({q, k, nullptr, mask, alibi_slopes, sinks, none, none, none, 0, 0, softmax_scale, causal,
                      window_left, window_right, softcap, 0});
  DLK_CHECK_VALUE(rows > 0 && cols > 0, "rows and cols must be positive, got ", rows, " and ", cols);
  const AttentionShape& s = call.in.shape;
  Tensor map = empty({s.B, s.H, rows, cols}, call.compute);
  const Tensor stats = call.empty_stats();
  if (stats.numel() == 0 || s.N == 0) {
    fill_with_zeros(map);
    return map;
  }
  attention_forward({call.in, {}, {}, call.stats_of(stats)}, current_runtime());
  attention_map({call.in, call.read_stats(stats), map.data(), rows, cols}, current_runtime());
  return map;
}

}  // namespace dlk
