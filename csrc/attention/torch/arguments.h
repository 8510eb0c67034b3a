// The arguments of the attention operators, in the order of their schemas; registration.cpp adds what they return.
//
// q, k and v are [B, heads, rows, width], or with cu_seqlens [rows, heads, width], where sequences follow each other.
// rng holds the seed and the offset of the dropout mask. max_seqlen_* are 0 for padded input and where they are
// unknown. causal is a number of Causal, a window of -1 is unbounded, and a softcap of 0 means none.
#pragma once

#include "attention/params.h"
#include "torch/boxing.h"

namespace dlk {

// The parts of which the lists below consist.
#define DLK_QUERIES_AND_KEYS(ARGUMENT) \
  ARGUMENT(Tensor, q, "")              \
  ARGUMENT(Tensor, k, "")
#define DLK_VALUES(ARGUMENT) ARGUMENT(Tensor, v, "")
#define DLK_SCORE_TENSORS(ARGUMENT)          \
  ARGUMENT(OptionalTensor, mask, "")         \
  ARGUMENT(OptionalTensor, alibi_slopes, "") \
  ARGUMENT(OptionalTensor, sinks, "")
#define DLK_SEQUENCES_AND_SEED(ARGUMENT)     \
  ARGUMENT(OptionalTensor, cu_seqlens_q, "") \
  ARGUMENT(OptionalTensor, cu_seqlens_k, "") \
  ARGUMENT(OptionalTensor, rng, "")          \
  ARGUMENT(int64_t, max_seqlen_q, "")        \
  ARGUMENT(int64_t, max_seqlen_k, "")
#define DLK_SCORE_RULES(ARGUMENT)     \
  ARGUMENT(double, softmax_scale, "") \
  ARGUMENT(int64_t, causal, "")       \
  ARGUMENT(int64_t, window_left, "")  \
  ARGUMENT(int64_t, window_right, "") \
  ARGUMENT(double, softcap, "")
#define DLK_DROPOUT(ARGUMENT) ARGUMENT(double, dropout_p, "")

// What AttentionCall reads, whichever operator is called. What the operator does not take is 0 or a null tensor.
struct AttentionArguments {
  DLK_QUERIES_AND_KEYS(DLK_MEMBER_OF_ARGUMENTS)
  DLK_VALUES(DLK_MEMBER_OF_ARGUMENTS)
  DLK_SCORE_TENSORS(DLK_MEMBER_OF_ARGUMENTS)
  DLK_SEQUENCES_AND_SEED(DLK_MEMBER_OF_ARGUMENTS)
  DLK_SCORE_RULES(DLK_MEMBER_OF_ARGUMENTS)
  DLK_DROPOUT(DLK_MEMBER_OF_ARGUMENTS)
};

#define DLK_ATTENTION_FORWARD(SHARED, OWN) \
  DLK_QUERIES_AND_KEYS(SHARED)             \
  DLK_VALUES(SHARED)                       \
  DLK_SCORE_TENSORS(SHARED)                \
  DLK_SEQUENCES_AND_SEED(SHARED)           \
  DLK_SCORE_RULES(SHARED)                  \
  DLK_DROPOUT(SHARED)                      \
  OWN(bool, contiguous, "")
DLK_ARGUMENTS_WITH_SHARED(AttentionForwardArguments, AttentionArguments, DLK_ATTENTION_FORWARD)

#define DLK_ATTENTION_BACKWARD(SHARED, OWN) \
  OWN(Tensor, do_, "")                      \
  OWN(OptionalTensor, dlse, "")             \
  DLK_QUERIES_AND_KEYS(SHARED)              \
  DLK_VALUES(SHARED)                        \
  OWN(Tensor, o, "")                        \
  OWN(Tensor, stats, "")                    \
  DLK_SCORE_TENSORS(SHARED)                 \
  DLK_SEQUENCES_AND_SEED(SHARED)            \
  DLK_SCORE_RULES(SHARED)                   \
  DLK_DROPOUT(SHARED)                       \
  OWN(bool, need_q, "")                     \
  OWN(bool, need_kv, "")                    \
  OWN(bool, need_mask, "")                  \
  OWN(bool, need_slopes, "")                \
  OWN(bool, need_sinks, "")
DLK_ARGUMENTS_WITH_SHARED(AttentionBackwardArguments, AttentionArguments, DLK_ATTENTION_BACKWARD)

#define DLK_ATTENTION_MAP(SHARED, OWN) \
  DLK_QUERIES_AND_KEYS(SHARED)         \
  DLK_SCORE_TENSORS(SHARED)            \
  DLK_SCORE_RULES(SHARED)              \
  OWN(int64_t, rows, "")               \
  OWN(int64_t, cols, "")
DLK_ARGUMENTS_WITH_SHARED(AttentionMapArguments, AttentionArguments, DLK_ATTENTION_MAP)

}  // namespace dlk
