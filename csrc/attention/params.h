// The parameters of one call of attention as plain structs, without torch or Python.
//
// There are B sequences, H query heads, Hkv heads of keys and values (H is a multiple of Hkv: query
// head h reads key head h / (H / Hkv)), M queries, N keys, and widths D and Dv. Padded tensors are
// [B, heads, rows, width]. With cu_q and cu_k the rows of all sequences follow each other instead,
// [heads, rows, width], and sequence b has the rows cu[b] .. cu[b + 1]. Strides count elements; the
// last one is always 1.
//
// The position of query i is p = i, or i + N - M with bottom_right (M, N of its own sequence).
// The compute type is double for f64 and float for every other dtype.
#pragma once

#include "core/types.h"

namespace dlk {

struct AttentionShape {
  DType dtype;
  int64_t B, H, Hkv;
  int64_t M, N;  // with cu_q, cu_k: rows of all sequences
  int64_t D, Dv;
  int64_t group() const { return Hkv ? H / Hkv : 0; }
};

// [B, heads, rows, width]; with cu_seqlens `b` is not read.
template <class Pointer>
struct HeadTensor {
  Pointer data;
  int64_t b, h, row;
};

// [B, H, M, N], a stride of 0 where the mask is broadcast.
struct MaskTensor {
  const void* data;  // null = no mask
  bool boolean;      // one byte each, 0 = masked out; else of `dtype`, added
  DType dtype;
  int64_t b, h, i, j;
};

enum class Causal : int { none, top_left, bottom_right };

struct AttentionInputs {
  AttentionShape shape;
  HeadTensor<const void*> q;   // [B, H, M, D]
  HeadTensor<const void*> k;   // [B, Hkv, N, D]
  HeadTensor<const void*> v;   // [B, Hkv, N, Dv]
  const int32_t *cu_q, *cu_k;  // [B + 1], nondecreasing from 0 to at most M and N; both null = padded
  MaskTensor mask;             // padded only
  const double* slopes;        // ALiBi: [B, H] (slopes_b = H) or [H] (slopes_b = 0); or null
  int64_t slopes_b;
  const double* sinks;    // [H], or null
  double scale, softcap;  // softcap 0 = none
  Causal causal;
  int64_t left, right;  // keys p - left .. p + right; -1 = unbounded
  double dropout_p;     // 0 = none
  uint64_t seed;
  uint32_t offset;
};

// The statistics of each row's softmax from which its probabilities can be computed again, [B, H, M] each, of the
// compute type. `top` is the score that is subtracted in the exponentials, in the kernels' own units, `weight` the
// reciprocal of the exponentials' sum. They are not stored as one number, because the logarithm of the sum would be
// lost to rounding beside a large score. A row that sees nothing has +inf and 0.
template <class Pointer>
struct SoftmaxStatistics {
  HeadTensor<Pointer> top, weight;
};

struct AttentionForwardParams {
  AttentionInputs in;
  HeadTensor<void*> o;    // [B, H, M, Dv]; data null = not wanted (then shape.Dv is 0)
  HeadTensor<void*> lse;  // [B, H, M] of the compute type; -inf for a row that sees nothing; data null = not wanted
  SoftmaxStatistics<void*> stats;
};

// [B, H, M, N] of the mask's dtype, contiguous; a stride of 0 where the mask is broadcast.
struct MaskGradient {
  void* data;  // null = not wanted
  int64_t elements;
  int64_t b, h, i, j;
};

struct AttentionBackwardParams {
  AttentionInputs in;
  HeadTensor<const void*> grad_o;        // [B, H, M, Dv]
  HeadTensor<const void*> grad_lse;      // [B, H, M] of the compute type; data null = zeros
  HeadTensor<const void*> o;             // [B, H, M, Dv]
  SoftmaxStatistics<const void*> stats;  // of the forward
  HeadTensor<void*> dq, dk, dv;          // data null = not wanted
  MaskGradient dmask;
  double* dslopes;  // as slopes, or null
  double* dsinks;   // [H], or null
};

struct AttentionMapParams {
  AttentionInputs in;                    // padded, no dropout
  SoftmaxStatistics<const void*> stats;  // of the forward
  void* map;                             // [B, H, rows, cols] of the compute type
  int64_t rows, cols;
};

// What ran, or would run; explain() and the tests read it.
struct AttentionPlan {
  Isa isa;
  int threads;                              // asked for, at most kMaxMembers
  enum Kernel : int { tiles, dot } kernel;  // multiplies q and k; the backward uses that of the forward
  int64_t block_m;                          // rows of a task; of all query heads that share keys
  int64_t block_n;                          // keys that are multiplied at once
  int64_t splits;                           // parts of a row's keys, each in a task; depends on sizes only
};

// mask_gradient: whether the backward computes the gradient of the mask.
AttentionPlan attention_plan(const AttentionInputs& in, Isa isa, int threads, bool backward, bool mask_gradient);

void attention_forward(const AttentionForwardParams& params, const Runtime& runtime);
void attention_backward(const AttentionBackwardParams& params, const Runtime& runtime);
void attention_map(const AttentionMapParams& params, const Runtime& runtime);

struct AttentionLastRun {
  AttentionPlan plan;
  int members;
  bool backward;
};
const AttentionLastRun& attention_last_run();

}  // namespace dlk
