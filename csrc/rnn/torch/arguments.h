// The arguments of the recurrent operators, in the order of their schemas; registration.cpp adds what they return.
//
// The *_dtype arguments are what autocast asks for, as numbers of DType; -1 stands for the dtype of x. With a
// product_dtype the tensors may have any dtypes except float64, and products may be rounded to product_dtype. Without
// it all tensors have the same dtype.
//
// resets: bool [T, B], or [rows] of packed x. cells: whether c of every step of the lstm is wanted, and dcells its
// gradient; both have the layout of y, with D*H features, and are stored time-major.
#pragma once

#include "rnn/params.h"
#include "torch/boxing.h"

namespace dlk {

using TensorList = std::vector<Tensor>;

#define DLK_SEQUENCE_FORWARD(ARGUMENT)      \
  ARGUMENT(Tensor, x, "")                   \
  ARGUMENT(OptionalTensor, h0, "")          \
  ARGUMENT(OptionalTensor, c0, "")          \
  ARGUMENT(TensorList, weights, "")         \
  ARGUMENT(OptionalTensor, packed, "")      \
  ARGUMENT(OptionalTensor, batch_sizes, "") \
  ARGUMENT(OptionalTensor, lengths, "")     \
  ARGUMENT(bool, bidirectional, "")         \
  ARGUMENT(bool, batch_first, "")           \
  ARGUMENT(bool, save, "")                  \
  ARGUMENT(bool, deterministic, "")         \
  ARGUMENT(int64_t, product_dtype, "=-1")   \
  ARGUMENT(int64_t, h_dtype, "=-1")         \
  ARGUMENT(int64_t, c_dtype, "=-1")         \
  ARGUMENT(OptionalTensor, resets, "=None") \
  ARGUMENT(bool, cells, "=False")
DLK_ARGUMENTS(SequenceForwardArguments, DLK_SEQUENCE_FORWARD)

#define DLK_SEQUENCE_BACKWARD(ARGUMENT)     \
  ARGUMENT(OptionalTensor, dy, "")          \
  ARGUMENT(OptionalTensor, dh_n, "")        \
  ARGUMENT(OptionalTensor, dc_n, "")        \
  ARGUMENT(Tensor, x, "")                   \
  ARGUMENT(OptionalTensor, h0, "")          \
  ARGUMENT(OptionalTensor, c0, "")          \
  ARGUMENT(TensorList, weights, "")         \
  ARGUMENT(Tensor, saved, "")               \
  ARGUMENT(OptionalTensor, batch_sizes, "") \
  ARGUMENT(OptionalTensor, lengths, "")     \
  ARGUMENT(bool, bidirectional, "")         \
  ARGUMENT(bool, batch_first, "")           \
  ARGUMENT(int64_t, bptt_steps, "")         \
  ARGUMENT(bool, deterministic, "")         \
  ARGUMENT(bool, need_x, "")                \
  ARGUMENT(bool, need_state, "")            \
  ARGUMENT(bool, need_weights, "")          \
  ARGUMENT(bool, gate_grads, "")            \
  ARGUMENT(int64_t, product_dtype, "=-1")   \
  ARGUMENT(OptionalTensor, resets, "=None") \
  ARGUMENT(OptionalTensor, dcells, "=None")
DLK_ARGUMENTS(SequenceBackwardArguments, DLK_SEQUENCE_BACKWARD)

// With layer normalisation, zoneout and recurrent dropout. `gains`, for each direction: norm_ih, norm_hh, then for the
// lstm norm_c, then if there are biases bias_c; empty without layer normalisation. The rates are read where the mask is
// absent.
#define DLK_VARIANT_FORWARD(ARGUMENT)       \
  ARGUMENT(Tensor, x, "")                   \
  ARGUMENT(OptionalTensor, h0, "")          \
  ARGUMENT(OptionalTensor, c0, "")          \
  ARGUMENT(TensorList, weights, "")         \
  ARGUMENT(TensorList, gains, "")           \
  ARGUMENT(OptionalTensor, dropout, "")     \
  ARGUMENT(OptionalTensor, mask_c, "")      \
  ARGUMENT(OptionalTensor, mask_h, "")      \
  ARGUMENT(OptionalTensor, batch_sizes, "") \
  ARGUMENT(OptionalTensor, lengths, "")     \
  ARGUMENT(double, eps, "")                 \
  ARGUMENT(double, zoneout_c, "")           \
  ARGUMENT(double, zoneout_h, "")           \
  ARGUMENT(bool, bidirectional, "")         \
  ARGUMENT(bool, batch_first, "")           \
  ARGUMENT(bool, save, "")                  \
  ARGUMENT(int64_t, product_dtype, "=-1")   \
  ARGUMENT(int64_t, h_dtype, "=-1")         \
  ARGUMENT(int64_t, c_dtype, "=-1")
DLK_ARGUMENTS(VariantForwardArguments, DLK_VARIANT_FORWARD)

#define DLK_VARIANT_BACKWARD(ARGUMENT)      \
  ARGUMENT(OptionalTensor, dy, "")          \
  ARGUMENT(OptionalTensor, dh_n, "")        \
  ARGUMENT(OptionalTensor, dc_n, "")        \
  ARGUMENT(Tensor, x, "")                   \
  ARGUMENT(OptionalTensor, h0, "")          \
  ARGUMENT(OptionalTensor, c0, "")          \
  ARGUMENT(TensorList, weights, "")         \
  ARGUMENT(TensorList, gains, "")           \
  ARGUMENT(OptionalTensor, dropout, "")     \
  ARGUMENT(OptionalTensor, mask_c, "")      \
  ARGUMENT(OptionalTensor, mask_h, "")      \
  ARGUMENT(Tensor, saved, "")               \
  ARGUMENT(OptionalTensor, batch_sizes, "") \
  ARGUMENT(OptionalTensor, lengths, "")     \
  ARGUMENT(double, eps, "")                 \
  ARGUMENT(double, zoneout_c, "")           \
  ARGUMENT(double, zoneout_h, "")           \
  ARGUMENT(bool, bidirectional, "")         \
  ARGUMENT(bool, batch_first, "")           \
  ARGUMENT(int64_t, bptt_steps, "")         \
  ARGUMENT(bool, need_x, "")                \
  ARGUMENT(bool, need_state, "")            \
  ARGUMENT(bool, need_weights, "")          \
  ARGUMENT(int64_t, product_dtype, "=-1")
DLK_ARGUMENTS(VariantBackwardArguments, DLK_VARIANT_BACKWARD)

#define DLK_CELL_FORWARD(ARGUMENT)        \
  ARGUMENT(Tensor, x, "")                 \
  ARGUMENT(OptionalTensor, h, "")         \
  ARGUMENT(OptionalTensor, c, "")         \
  ARGUMENT(Tensor, w_ih, "")              \
  ARGUMENT(Tensor, w_hh, "")              \
  ARGUMENT(OptionalTensor, b_ih, "")      \
  ARGUMENT(OptionalTensor, b_hh, "")      \
  ARGUMENT(bool, save, "")                \
  ARGUMENT(bool, deterministic, "")       \
  ARGUMENT(int64_t, product_dtype, "=-1") \
  ARGUMENT(int64_t, h_dtype, "=-1")       \
  ARGUMENT(int64_t, c_dtype, "=-1")
DLK_ARGUMENTS(CellForwardArguments, DLK_CELL_FORWARD)

#define DLK_CELL_BACKWARD(ARGUMENT)  \
  ARGUMENT(OptionalTensor, dh, "")   \
  ARGUMENT(OptionalTensor, dc, "")   \
  ARGUMENT(Tensor, x, "")            \
  ARGUMENT(OptionalTensor, h, "")    \
  ARGUMENT(OptionalTensor, c, "")    \
  ARGUMENT(Tensor, w_ih, "")         \
  ARGUMENT(Tensor, w_hh, "")         \
  ARGUMENT(OptionalTensor, b_ih, "") \
  ARGUMENT(OptionalTensor, b_hh, "") \
  ARGUMENT(Tensor, saved, "")        \
  ARGUMENT(bool, deterministic, "")  \
  ARGUMENT(bool, need_x, "")         \
  ARGUMENT(bool, need_state, "")     \
  ARGUMENT(bool, need_weights, "")   \
  ARGUMENT(bool, gate_grads, "")     \
  ARGUMENT(int64_t, product_dtype, "=-1")
DLK_ARGUMENTS(CellBackwardArguments, DLK_CELL_BACKWARD)

// bits: of a packed weight; 0 for those of its dtype.
#define DLK_PACK(ARGUMENT)          \
  ARGUMENT(std::string, mode, "")   \
  ARGUMENT(TensorList, weights, "") \
  ARGUMENT(bool, bidirectional, "") \
  ARGUMENT(int64_t, bits, "=0")
DLK_ARGUMENTS(PackArguments, DLK_PACK)

}  // namespace dlk
