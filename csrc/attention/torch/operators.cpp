#include <limits>

#include "boundary.h"

namespace dlk {
namespace {

// Fills lse and stats of the rows behind the last sequence, which no kernel writes.
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

namespace on_cpu {

std::tuple<Tensor, Tensor, Tensor> attention(const AttentionForwardArguments& a) {
  const AttentionCall call(a);
  const AttentionShape& shape = call.in.shape;
  Tensor o = call.empty_result(a.q, a.contiguous);
  Tensor lse = call.empty_lse(), stats = call.empty_stats();
  fill_uncovered(call, o, lse, stats);
  if (lse.numel() > 0) {
    attention_forward({call.in, call.heads_of(o), call.lse_of(lse), call.stats_of(stats)}, current_runtime());
    remember_attention(shape);
  }
  return {std::move(o), std::move(lse), std::move(stats)};
}

std::vector<Tensor> attention_backward(const AttentionBackwardArguments& a) {
  AttentionCall call(a);
  const AttentionShape& s = call.in.shape;
  DLK_CHECK(!a.need_mask || (a.mask && !call.in.mask.boolean), "need_mask: there is no mask with a gradient");
  DLK_CHECK(!a.need_slopes || a.alibi_slopes, "need_slopes: there are no alibi_slopes");
  DLK_CHECK(!a.need_sinks || a.sinks, "need_sinks: there are no sinks");

  AttentionBackwardParams params{};
  call.check_heads(a.do_, "do", s.H, s.M, s.Dv);
  call.check_heads(a.o, "o", s.H, s.M, s.Dv);
  call.check_stats(a.stats);
  if (a.dlse) call.check_lse(a.dlse, "dlse");
  params.grad_o = call.inputs.heads(a.do_);
  params.o = call.inputs.heads(a.o);
  params.stats = call.read_stats(a.stats);
  if (a.dlse) params.grad_lse = call.read_lse(a.dlse);
  params.in = call.in;

  std::vector<Tensor> grads;
  const auto heads_output = [&](bool wanted, int64_t heads, int64_t rows, int64_t width, HeadTensor<void*>* into) {
    grads.push_back(wanted ? call.empty_heads(heads, rows, width) : absent(call.dtype));
    if (wanted) *into = call.heads_of(grads.back());
  };
  heads_output(a.need_q, s.H, s.M, s.D, &params.dq);
  heads_output(a.need_kv, s.Hkv, s.N, s.D, &params.dk);
  heads_output(a.need_kv, s.Hkv, s.N, s.Dv, &params.dv);
  if (a.need_mask) {
    grads.push_back(empty_like(a.mask));
    const Tensor& dmask = grads.back();
    const auto stride = [&](int d) { return dmask.size(d) == 1 ? int64_t{0} : dmask.strides()[d]; };
    params.dmask = {dmask.data(), dmask.numel(), stride(0), stride(1), stride(2), stride(3)};
  } else {
    grads.push_back(absent(call.dtype));
  }
  std::vector<double> dslopes(a.need_slopes ? static_cast<size_t>(a.alibi_slopes.numel()) + 1 : 0);
  std::vector<double> dsinks(a.need_sinks ? static_cast<size_t>(s.H) + 1 : 0);
  if (a.need_slopes) params.dslopes = dslopes.data();
  if (a.need_sinks) params.dsinks = dsinks.data();

  const bool empty_call = s.B * s.H == 0 || (s.M == 0 && s.N == 0);
  const bool uncovered = call.varlen() && (call.in.cu_q[s.B] != s.M || call.in.cu_k[s.B] != s.N);
  if (empty_call || uncovered) {
    for (const Tensor& grad : grads) fill_with_zeros(grad);
  }
  if (!empty_call) {
    dlk::attention_backward(params, current_runtime());
    remember_attention(s);
  }
  const auto small_output = [&](bool wanted, const OptionalTensor& like, std::vector<double>& values) {
    if (!wanted) {
      grads.push_back(absent(call.dtype));
      return;
    }
    values.pop_back();  // the element that only made the address valid
    grads.push_back(empty_like(like));
    from_doubles(values, check_float(like, "gradient"), grads.back().data());
  };
  small_output(a.need_slopes, a.alibi_slopes, dslopes);
  small_output(a.need_sinks, a.sinks, dsinks);
  return grads;
}

Tensor attention_map(const AttentionMapArguments& a) {
  AttentionCall call(a);
  DLK_CHECK_VALUE(a.rows > 0 && a.cols > 0, "rows and cols must be positive, got ", a.rows, " and ", a.cols);
  const AttentionShape& s = call.in.shape;
  Tensor map = empty({s.B, s.H, a.rows, a.cols}, call.compute);
  const Tensor stats = call.empty_stats();
  if (stats.numel() == 0 || s.N == 0) {
    fill_with_zeros(map);
    return map;
  }
  attention_forward({call.in, {}, {}, call.stats_of(stats)}, current_runtime());
  dlk::attention_map({call.in, call.read_stats(stats), map.data(), a.rows, a.cols}, current_runtime());
  return map;
}

}  // namespace on_cpu
}  // namespace dlk
