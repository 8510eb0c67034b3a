#include "boundary.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd/storage.h"

namespace dlk {
namespace {

thread_local AttentionShape last_called{};
thread_local bool has_called = false;

// Computes strides without gaps that keep the order of the strides `given`. The algorithm is that of torch.empty_like,
// so dimensions whose order is undefined (stride 0, equal strides) come in the same order as there.
void dense_strides_in_order(const int64_t* sizes, const int64_t* given, int64_t* strides) {
  int order[] = {3, 2, 1, 0};                   // from the innermost dimension outwards
  const auto comes_after = [&](int a, int b) {  // 0: the order is undefined
    if (given[a] == 0 || given[b] == 0) return 0;
    if (given[a] != given[b]) return given[a] < given[b] ? -1 : 1;
    return sizes[a] > sizes[b] ? 1 : 0;
  };
  for (int i = 1; i < 4; ++i)
    for (int at = i, j = i - 1; j >= 0; --j) {
      const int comparison = comes_after(order[j], order[at]);
      if (comparison < 0) break;
      if (comparison > 0) std::swap(order[j], order[at]), at = j;
    }
  int64_t count = 1;
  for (int d : order) {
    strides[d] = count;
    if (sizes[d] > 1) count *= sizes[d];
  }
}

// The strides of torch.empty_like(q) for [B, H, M, D].
void strides_like(const Tensor& q, int64_t* strides) {
  const int64_t *sizes = q.sizes(), *given = q.strides();
  int64_t covered = 1;  // how many elements the dimensions found so far cover without a gap
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] <= 1 || given[d] != covered) continue;
    covered *= sizes[d];
    d = -1;
  }
  if (covered == q.numel() || q.numel() == 0) {
    std::copy(given, given + 4, strides);
  } else {
    dense_strides_in_order(sizes, given, strides);
  }
}

// Copies cu_seqlens, int32 [B + 1], and checks that the copy begins with 0, never falls and never exceeds `rows`.
std::vector<int32_t> read_cu_seqlens(const OptionalTensor& tensor, const char* what, int64_t rows, int64_t max_seqlen) {
  std::vector<int32_t> values = copy_values<int32_t>(tensor);
  DLK_CHECK_VALUE(values[0] == 0, what, " must begin with 0, got ", values[0]);
  for (size_t b = 1; b < values.size(); ++b) {
    DLK_CHECK_VALUE(values[b] >= values[b - 1] && values[b] <= rows, what, " must not fall and must not exceed the ",
                    rows, " rows that there are, got ", values[b], " after ", values[b - 1]);
    DLK_CHECK_VALUE(max_seqlen == 0 || values[b] - values[b - 1] <= max_seqlen, what, " has a sequence of ",
                    values[b] - values[b - 1], " rows, more than max_seqlen ", max_seqlen);
  }
  return values;
}

}  // namespace

void remember_attention(const AttentionShape& shape) {
  last_called = shape;
  has_called = true;
}

const AttentionShape* last_attention_shape() { return has_called ? &last_called : nullptr; }

std::vector<double> as_doubles(const Tensor& tensor, DType dtype, Inputs* inputs) {
  const void* data = inputs->contiguous(tensor);
  std::vector<double> values(static_cast<size_t>(tensor.numel()));
  for (size_t i = 0; i < values.size(); ++i) {
    switch (dtype) {
      case DType::f64:
        values[i] = static_cast<const double*>(data)[i];
        break;
      case DType::f32:
        values[i] = static_cast<double>(static_cast<const float*>(data)[i]);
        break;
      case DType::bf16:
        values[i] = static_cast<double>(to_float(static_cast<const bf16*>(data)[i]));
        break;
      case DType::f16:
        values[i] = static_cast<double>(to_float(static_cast<const f16*>(data)[i]));
        break;
    }
  }
  return values;
}

void from_doubles(const std::vector<double>& values, DType dtype, void* out) {
  for (size_t i = 0; i < values.size(); ++i) {
    switch (dtype) {
      case DType::f64:
        static_cast<double*>(out)[i] = values[i];
        break;
      case DType::f32:
        static_cast<float*>(out)[i] = static_cast<float>(values[i]);
        break;
      case DType::bf16:
        static_cast<bf16*>(out)[i] = to_bf16(static_cast<float>(values[i]));
        break;
      case DType::f16:
        static_cast<f16*>(out)[i] = to_f16(static_cast<float>(values[i]));
        break;
    }
  }
}

AttentionCall::AttentionCall(const AttentionArguments& a) {
  check_sizes(a);
  if (a.cu_seqlens_q) check_sequences(a);
  if (a.mask) read_mask(a.mask);
  read_rules(a);
  // All shapes are right; from here on tensors are copied.
  if (a.cu_seqlens_q) read_sequences(a);
  in.q = inputs.heads(a.q);
  in.k = inputs.heads(a.k);
  if (a.v.get()) in.v = inputs.heads(a.v);
}

void AttentionCall::check_sizes(const AttentionArguments& a) {
  const bool packed = packed_ = static_cast<bool>(a.cu_seqlens_q);
  DLK_CHECK(packed == static_cast<bool>(a.cu_seqlens_k),
            "cu_seqlens_q and cu_seqlens_k must be given together or not at all");
  AttentionShape& s = in.shape;
  s.dtype = check_float(a.q, "q");
  dtype = a.q.dtype();
  compute = torch_dtype(compute_type(s.dtype));
  const int64_t dim = packed ? 3 : 4;
  const char* const layout = packed ? "[rows, heads, width] with cu_seqlens" : "[B, heads, rows, width]";
  DLK_CHECK(a.q.dim() == dim, "q must have shape ", layout, ", got ", shape_text(a.q));
  DLK_CHECK(a.k.dim() == dim, "k must have shape ", layout, ", got ", shape_text(a.k));
  const int64_t heads = 1, rows = packed ? 0 : 2;
  s.B = packed ? a.cu_seqlens_q.numel() - 1 : a.q.size(0);
  s.H = a.q.size(heads);
  s.M = a.q.size(rows);
  s.D = a.q.size(dim - 1);
  s.Hkv = a.k.size(heads);
  s.N = a.k.size(rows);
  check_heads(a.k, "k", s.Hkv, s.N, s.D);
  DLK_CHECK(s.Hkv ? s.H % s.Hkv == 0 : s.H == 0, "the ", s.H, " heads of q must be a multiple of the ", s.Hkv,
            " heads of k");
  DLK_CHECK_VALUE(a.max_seqlen_q >= 0 && a.max_seqlen_k >= 0,
                  "max_seqlen_q and max_seqlen_k must not be negative, got ", a.max_seqlen_q, " and ", a.max_seqlen_k);
  if (!a.v.get()) return;
  DLK_CHECK(a.v.dim() == dim, "v must have shape ", layout, ", got ", shape_text(a.v));
  s.Dv = a.v.size(dim - 1);
  check_heads(a.v, "v", s.Hkv, s.N, s.Dv);
}

void AttentionCall::check_sequences(const AttentionArguments& a) const {
  DLK_CHECK(!a.mask, "mask must be None with cu_seqlens");
  check_vector(a.cu_seqlens_q, "cu_seqlens_q", aoti_torch_dtype_int32());
  check_vector(a.cu_seqlens_k, "cu_seqlens_k", aoti_torch_dtype_int32());
  DLK_CHECK(a.cu_seqlens_q.numel() > 0, "cu_seqlens_q must have shape [B + 1], got ", shape_text(a.cu_seqlens_q));
  DLK_CHECK(a.cu_seqlens_k.numel() == in.shape.B + 1, "cu_seqlens_k must have shape [", in.shape.B + 1,
            "] like cu_seqlens_q, got ", shape_text(a.cu_seqlens_k));
}

void AttentionCall::read_sequences(const AttentionArguments& a) {
  cu_q_ = read_cu_seqlens(a.cu_seqlens_q, "cu_seqlens_q", in.shape.M, a.max_seqlen_q);
  cu_k_ = read_cu_seqlens(a.cu_seqlens_k, "cu_seqlens_k", in.shape.N, a.max_seqlen_k);
  in.cu_q = cu_q_.data();
  in.cu_k = cu_k_.data();
}

void AttentionCall::read_mask(const OptionalTensor& mask) {
  const AttentionShape& s = in.shape;
  const int64_t full[] = {s.B, s.H, s.M, s.N};
  DLK_CHECK(mask.on_cpu(), "mask must be on the CPU like q");
  const bool boolean = mask.dtype() == aoti_torch_dtype_bool();
  DLK_CHECK(boolean || mask.dtype() == dtype || mask.dtype() == aoti_torch_dtype_float32(),
            "mask must be bool, float32 or of the dtype of q, got ", dtype_text(mask.dtype()));
  bool fits = mask.dim() == 4;
  for (int d = 0; fits && d < 4; ++d) fits = mask.size(d) == full[d] || mask.size(d) == 1;
  DLK_CHECK(fits, "mask must have shape ", shape_text(full, 4), " or 1 where it is broadcast, got ", shape_text(mask));
  const int64_t* strides = mask.strides();
  const auto stride = [&](int d) { return mask.size(d) == 1 ? int64_t{0} : strides[d]; };
  in.mask = {mask.data(), boolean,  boolean ? s.dtype : check_float(mask, "mask"), stride(0), stride(1),
             stride(2),   stride(3)};
}

void AttentionCall::read_rules(const AttentionArguments& a) {
  const AttentionShape& s = in.shape;
  if (a.alibi_slopes) {
    const DType type = check_float(a.alibi_slopes, "alibi_slopes");
    const bool per_sequence = a.alibi_slopes.dim() == 2;
    DLK_CHECK(a.alibi_slopes.dim() >= 1 && a.alibi_slopes.dim() <= 2 &&
                  a.alibi_slopes.numel() == (per_sequence ? s.B : 1) * s.H && a.alibi_slopes.size(per_sequence) == s.H,
              "alibi_slopes must have shape [", s.H, "] or [", s.B, ", ", s.H, "], got ", shape_text(a.alibi_slopes));
    slopes_ = as_doubles(a.alibi_slopes, type, &inputs);
    slopes_.push_back(0);  // so that the pointer is not null even without heads
    in.slopes = slopes_.data();
    in.slopes_b = per_sequence ? s.H : 0;
  }
  if (a.sinks) {
    const DType type = check_float(a.sinks, "sinks");
    DLK_CHECK(a.sinks.dim() == 1 && a.sinks.numel() == s.H, "sinks must have shape [", s.H, "], got ",
              shape_text(a.sinks));
    sinks_ = as_doubles(a.sinks, type, &inputs);
    const double largest = s.dtype == DType::f64 ? std::numeric_limits<double>::max()
                                                 : static_cast<double>(std::numeric_limits<float>::max());
    for (double& sink : sinks_)
      if (std::isfinite(sink)) sink = std::clamp(sink, -largest, largest);
    sinks_.push_back(0);
    in.sinks = sinks_.data();
  }
  DLK_CHECK_VALUE(std::isfinite(a.softmax_scale), "softmax_scale must be finite, got ", a.softmax_scale);
  const double softcap_limit = s.dtype == DType::f64 ? 0x1p1022 : 0x1p126;  // its reciprocal is a normal number
  DLK_CHECK_VALUE(a.softcap >= 0 && a.softcap <= softcap_limit, "softcap must lie in 0..", softcap_limit, ", got ",
                  a.softcap);
  DLK_CHECK_VALUE(a.dropout_p >= 0 && a.dropout_p <= 1, "dropout_p must lie in 0..1, got ", a.dropout_p);
  DLK_CHECK_VALUE(a.causal >= 0 && a.causal <= 2, "causal must be 0 (none), 1 (top_left) or 2 (bottom_right), got ",
                  a.causal);
  DLK_CHECK_VALUE(a.window_left >= -1 && a.window_right >= -1,
                  "window_left and window_right must not be below -1 (unbounded), got ", a.window_left, " and ",
                  a.window_right);
  in.scale = a.softmax_scale;
  in.softcap = a.softcap;
  in.causal = static_cast<Causal>(a.causal);
  in.left = a.window_left;
  in.right = a.window_right;
  in.dropout_p = a.dropout_p;
  if (a.dropout_p == 0) return;
  DLK_CHECK(a.rng, "rng must be given with dropout_p");
  check_tensor(a.rng, "rng", aoti_torch_dtype_int64(), {2});
  const std::vector<int64_t> seed = copy_values<int64_t>(a.rng);
  in.seed = static_cast<uint64_t>(seed[0]);
  in.offset = static_cast<uint32_t>(seed[1]);
}

Tensor AttentionCall::empty_heads(int64_t heads, int64_t rows, int64_t width) const {
  if (varlen()) return empty({rows, heads, width}, dtype);
  const int64_t sizes[] = {in.shape.B, heads, rows, width};
  const int64_t strides[] = {rows * heads * width, width, heads * width, 1};
  return empty_strided(sizes, strides, 4, dtype);
}

Tensor AttentionCall::empty_result(const Tensor& q, bool contiguous) const {
  const AttentionShape& s = in.shape;
  if (varlen()) return empty_heads(s.H, s.M, s.Dv);
  const int64_t sizes[] = {s.B, s.H, s.M, s.Dv};
  int64_t strides[4] = {0, 0, 0, 0};
  if (!contiguous && s.Dv == s.D && q.strides()[3] == 1) strides_like(q, strides);
  // The kernels need a last stride of 1.
  return strides[3] == 1 ? empty_strided(sizes, strides, 4, dtype) : empty(sizes, 4, dtype);
}

Tensor AttentionCall::empty_lse() const {
  if (varlen()) return empty({in.shape.H, in.shape.M}, compute);
  return empty({in.shape.B, in.shape.H, in.shape.M}, compute);
}

Tensor AttentionCall::empty_stats() const {
  if (varlen()) return empty({in.shape.H, 2, in.shape.M}, compute);
  return empty({in.shape.B, in.shape.H, 2, in.shape.M}, compute);
}

void AttentionCall::check_heads(const Tensor& tensor, const char* what, int64_t heads, int64_t rows,
                                int64_t width) const {
  if (varlen()) {
    check_tensor(tensor, what, dtype, {rows, heads, width});
  } else {
    check_tensor(tensor, what, dtype, {in.shape.B, heads, rows, width});
  }
}

void AttentionCall::check_lse(const Tensor& tensor, const char* what) const {
  const AttentionShape& s = in.shape;
  if (varlen()) {
    check_tensor(tensor, what, compute, {s.H, s.M});
  } else {
    check_tensor(tensor, what, compute, {s.B, s.H, s.M});
  }
}

HeadTensor<const void*> AttentionCall::read_lse(const Tensor& tensor) {
  return {inputs.contiguous(tensor), in.shape.H * in.shape.M, in.shape.M, 1};
}

HeadTensor<void*> AttentionCall::heads_of(const Tensor& output) const {
  const int64_t* strides = output.strides();
  if (varlen()) return {output.data(), 0, strides[1], strides[0]};
  return {output.data(), strides[0], strides[1], strides[2]};
}

HeadTensor<void*> AttentionCall::lse_of(const Tensor& output) const {
  return {output.data(), in.shape.H * in.shape.M, in.shape.M, 1};
}

void AttentionCall::check_stats(const Tensor& tensor) const {
  const AttentionShape& s = in.shape;
  if (varlen()) {
    check_tensor(tensor, "stats", compute, {s.H, 2, s.M});
  } else {
    check_tensor(tensor, "stats", compute, {s.B, s.H, 2, s.M});
  }
}

SoftmaxStatistics<const void*> AttentionCall::read_stats(const Tensor& tensor) {
  return statistics<const void*>(static_cast<const char*>(inputs.contiguous(tensor)));
}

SoftmaxStatistics<void*> AttentionCall::stats_of(const Tensor& output) const {
  return statistics<void*>(static_cast<char*>(output.data()));
}

}  // namespace dlk
