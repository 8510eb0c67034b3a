// The checks of a recurrent call, the same on every device. Values of integer tensors are checked in copies, because
// another thread may write to the caller's tensors while the call runs. `device` is null for the CPU.
#pragma once

#include <vector>

#include "torch/checks.h"
#include "rnn/torch/ops.h"

namespace dlk {

// The dtypes of a call's tensors. Without a product_dtype all tensors have the dtype of x.
class Dtypes {
 public:
  Dtypes() = default;
  Dtypes(DType of_x, int64_t product) : of_x_(of_x), product_(of_x), mixed_(product != -1) {
    if (mixed_) product_ = wanted(product, "product_dtype");
  }

  DType product() const { return product_; }
  // The dtype of a result, from a number of DType or -1 for the dtype of x.
  DType result(int64_t number, const char* what) const { return number == -1 ? of_x_ : wanted(number, what); }
  // The dtype that an argument may have: its own if the call may mix dtypes, else that of x. `check` compares.
  DType of(const Tensor& tensor) const {
    if (mixed_) {
      for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        if (tensor.dtype() == torch_dtype(dtype)) return dtype;
    }
    return of_x_;
  }
  void check(const Tensor& tensor, const char* what, std::initializer_list<int64_t> shape,
             const Device* device = nullptr) const {
    check_tensor(tensor, what, torch_dtype(of(tensor)), shape, device);
  }

 private:
  DType wanted(int64_t number, const char* what) const {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      if (mixed_ && of_x_ != DType::f64 && number == static_cast<int64_t>(dtype)) return dtype;
    }
    throw std::runtime_error(concat(what, " must be -1, or in a call of float32, bfloat16 and float16 with a ",
                                    "product_dtype 0, 2 or 3, got ", number));
  }

  DType of_x_ = DType::f32, product_ = DType::f32;
  bool mixed_ = false;
};

inline std::vector<int64_t> read_batch_sizes(const OptionalTensor& batch_sizes, const Tensor& x, LayerShape* shape) {
  DLK_CHECK(x.dim() == 2, "x must be packed data of shape [rows, input_size] with batch_sizes, got ", shape_text(x));
  check_vector(batch_sizes, "batch_sizes", aoti_torch_dtype_int64());
  shape->T = batch_sizes.numel();
  shape->rows = x.size(0);
  DLK_CHECK(shape->T > 0, "batch_sizes must not be empty");
  DLK_CHECK(shape->T <= shape->rows, "batch_sizes must be positive and must sum to the rows of x, got ", shape->T,
            " steps for ", shape->rows, " rows");
  std::vector<int64_t> sizes = copy_values<int64_t>(batch_sizes);
  int64_t rows = 0;
  for (size_t t = 0; t < sizes.size(); ++t) {
    DLK_CHECK(sizes[t] > 0 && sizes[t] <= (t ? sizes[t - 1] : shape->rows),
              "batch_sizes must be positive and must not increase, got ", sizes[t], " at step ", t,
              t ? concat(" after ", sizes[t - 1]) : concat(" for ", shape->rows, " rows"));
    if (__builtin_add_overflow(rows, sizes[t], &rows)) rows = INT64_MAX;
  }
  DLK_CHECK(rows == shape->rows, "batch_sizes must sum to the rows of x, got ", rows, " and ", shape->rows);
  shape->B = sizes[0];
  return sizes;
}

// Fills T, B and rows; returns a copy of batch_sizes, empty for padded x. Checks lengths except for their values, which
// may be on a device.
inline std::vector<int64_t> read_layout(const Tensor& x, const OptionalTensor& batch_sizes,
                                        const OptionalTensor& lengths, bool batch_first, const Device* device,
                                        LayerShape* shape) {
  DLK_CHECK(!(batch_sizes && lengths), "lengths are for padded x, batch_sizes for packed x: give one of them");
  if (batch_sizes) return read_batch_sizes(batch_sizes, x, shape);
  DLK_CHECK(x.dim() == 3, "x must have shape ", batch_first ? "[B, T, input_size]" : "[T, B, input_size]", ", got ",
            shape_text(x));
  shape->T = x.size(batch_first ? 1 : 0);
  shape->B = x.size(batch_first ? 0 : 1);
  shape->rows = shape->T * shape->B;
  DLK_CHECK(shape->T > 0, "x must have at least one time step, got shape ", shape_text(x));
  if (lengths) {
    check_vector(lengths, "lengths", aoti_torch_dtype_int64(), device);
    check_tensor(lengths, "lengths", aoti_torch_dtype_int64(), {shape->B}, device);
  }
  return {};
}

// Copies lengths, which are on the CPU, and checks the values; read_layout has checked everything else.
inline std::vector<int64_t> read_lengths(const Tensor& lengths, int64_t T) {
  std::vector<int64_t> values = copy_values<int64_t>(lengths);
  for (size_t b = 0; b < values.size(); ++b) {
    DLK_CHECK_VALUE(values[b] >= 0 && values[b] <= T, "lengths must lie in 0..T (T=", T, "), got ", values[b],
                    " at position ", b);
  }
  return values;
}

// Fills H and P from the layer's weights, checks all weights, and returns their number per direction. The cell, D and I
// must be filled in before.
inline size_t check_weights(const TensorList& weights, const Dtypes& dtypes, const Device* device, LayerShape* shape) {
  const size_t count = weights.size() / static_cast<size_t>(shape->D);
  DLK_CHECK(weights.size() % static_cast<size_t>(shape->D) == 0 && count >= 2 && count <= 5, "weights must hold ",
            shape->D == 2 ? "two directions of " : "", "w_ih, w_hh[, b_ih, b_hh][, w_hr], got ", weights.size(),
            " tensors");
  const bool bias = count >= 4, projected = count % 2 == 1;
  DLK_CHECK(!projected || cell_traits(shape->cell).projection, "weights: only lstm has projections, ",
            mode_name(shape->cell), " takes 2 or 4 tensors per direction, got ", count);
  const int64_t gates = gate_count(shape->cell);
  DLK_CHECK(weights[1].dim() == 2 && weights[1].size(0) % gates == 0, "w_hh must have shape [", gates,
            " * hidden_size, ...], got ", shape_text(weights[1]));
  shape->H = weights[1].size(0) / gates;
  DLK_CHECK(shape->H > 0, "hidden_size must be positive, got weights of shape ", shape_text(weights[1]));
  if (projected) {
    const Tensor& w_hr = weights[count - 1];
    DLK_CHECK(w_hr.dim() == 2 && w_hr.size(0) > 0, "w_hr must have shape [proj_size, hidden_size], got ",
              shape_text(w_hr));
    shape->P = w_hr.size(0);
  }
  const int32_t dtype = torch_dtype(dtypes.of(weights[0]));
  for (int d = 0; d < shape->D; ++d) {
    const Tensor* w = &weights[static_cast<size_t>(d) * count];
    check_tensor(w[0], "w_ih", dtype, {gates * shape->H, shape->I}, device);
    check_tensor(w[1], "w_hh", dtype, {gates * shape->H, shape->outputs()}, device);
    if (bias) {
      check_tensor(w[2], "b_ih", dtype, {gates * shape->H}, device);
      check_tensor(w[3], "b_hh", dtype, {gates * shape->H}, device);
    }
    if (projected) check_tensor(w[count - 1], "w_hr", dtype, {shape->P, shape->H}, device);
  }
  return count;
}

// A time-major copy of resets, which are on the CPU and have been checked; empty if absent.
inline std::vector<uint8_t> read_resets(const OptionalTensor& resets) {
  if (!resets) return {};
  const bool padded = resets.dim() == 2;
  const int64_t T = resets.size(0), B = padded ? resets.size(1) : 1;
  const int64_t t_stride = resets.strides()[0], b_stride = padded ? resets.strides()[1] : 0;
  const uint8_t* from = static_cast<const uint8_t*>(resets.data());
  std::vector<uint8_t> flags(static_cast<size_t>(T * B));
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t b = 0; b < B; ++b) {
      flags[static_cast<size_t>(t * B + b)] =
          __atomic_load_n(from + t * t_stride + b * b_stride, __ATOMIC_RELAXED) != 0;
    }
  }
  return flags;
}

inline void check_cell_state(CellKind cell, const OptionalTensor& c, const char* what) {
  DLK_CHECK(cell_traits(cell).cell_state || !c, what, " must be None: ", mode_name(cell), " has no cell state");
}

inline void check_cells_exist(CellKind cell, bool wanted) {
  DLK_CHECK(cell_traits(cell).cell_state || !wanted, "cells must be False: ", mode_name(cell), " has no cell state");
}

// The arguments `resets` and `dcells`, or absent ones if the operator has none.
inline const OptionalTensor& absent_argument() {
  static const OptionalTensor none;
  return none;
}
template <class Arguments>
auto resets_of(const Arguments& a, int) -> decltype((a.resets)) {
  return a.resets;
}
template <class Arguments>
const OptionalTensor& resets_of(const Arguments&, long) {
  return absent_argument();
}
template <class Arguments>
auto dcells_of(const Arguments& a, int) -> decltype((a.dcells)) {
  return a.dcells;
}
template <class Arguments>
const OptionalTensor& dcells_of(const Arguments&, long) {
  return absent_argument();
}

// Checks the arguments that forward and backward of a sequence have in common, except for the values of lengths, and
// fills `shape`, whose cell and dtype must be filled in before. Returns a copy of batch_sizes, empty for padded x.
template <class Arguments>
std::vector<int64_t> read_sequence(const Arguments& a, const Dtypes& dtypes, const Device* device, LayerShape* shape) {
  shape->D = a.bidirectional ? 2 : 1;
  std::vector<int64_t> batch_sizes = read_layout(a.x, a.batch_sizes, a.lengths, a.batch_first, device, shape);
  shape->I = a.x.size(a.x.dim() - 1);
  check_weights(a.weights, dtypes, device, shape);
  check_cell_state(shape->cell, a.c0, "c0");
  if (a.h0) dtypes.check(a.h0, "h0", {shape->D, shape->B, shape->outputs()}, device);
  if (a.c0) dtypes.check(a.c0, "c0", {shape->D, shape->B, shape->H}, device);
  const int32_t flag = aoti_torch_dtype_bool();
  const OptionalTensor& resets = resets_of(a, 0);
  if (resets && a.batch_sizes) check_tensor(resets, "resets", flag, {shape->rows}, device);
  if (resets && !a.batch_sizes) check_tensor(resets, "resets", flag, {shape->T, shape->B}, device);
  return batch_sizes;
}

// `record` is the number of values in a saved record.
template <class Arguments>
void check_sequence_gradients(const Arguments& a, const Dtypes& dtypes, const Device* device, const LayerShape& shape,
                              int64_t record) {
  check_cell_state(shape.cell, a.dc_n, "dc_n");
  const OptionalTensor& dcells = dcells_of(a, 0);
  check_cell_state(shape.cell, dcells, "dcells");
  DLK_CHECK_VALUE(a.bptt_steps >= 0, "bptt_steps must not be negative, got ", a.bptt_steps);
  if (a.dh_n) dtypes.check(a.dh_n, "dh_n", {shape.D, shape.B, shape.outputs()}, device);
  if (a.dc_n) dtypes.check(a.dc_n, "dc_n", {shape.D, shape.B, shape.H}, device);
  const int64_t features = shape.D * shape.outputs(), of_cells = shape.D * shape.H;
  const int32_t compute = torch_dtype(compute_type(shape.dtype));
  if (a.batch_sizes) {
    if (a.dy) dtypes.check(a.dy, "dy", {shape.rows, features}, device);
    if (dcells) dtypes.check(dcells, "dcells", {shape.rows, of_cells}, device);
    check_tensor(a.saved, "saved", compute, {shape.D, shape.rows, record}, device);
  } else {
    const int64_t outer = a.batch_first ? shape.B : shape.T, inner = a.batch_first ? shape.T : shape.B;
    if (a.dy) dtypes.check(a.dy, "dy", {outer, inner, features}, device);
    if (dcells) dtypes.check(dcells, "dcells", {outer, inner, of_cells}, device);
    check_tensor(a.saved, "saved", compute, {shape.D, shape.T, shape.B, record}, device);
  }
}

// The same for a cell, whose shape is that of one step in one direction.
template <class Arguments>
void read_cell(const Arguments& a, const Dtypes& dtypes, const Device* device, LayerShape* shape) {
  DLK_CHECK(a.x.dim() == 2, "x must have shape [B, input_size], got ", shape_text(a.x));
  DLK_CHECK(a.w_hh.dim() == 2, "w_hh must have two dimensions, got shape ", shape_text(a.w_hh));
  DLK_CHECK(!a.b_ih == !a.b_hh, "b_ih and b_hh must both be given or both be None");
  check_cell_state(shape->cell, a.c, "c");
  shape->T = shape->D = 1;
  shape->B = shape->rows = a.x.size(0);
  shape->I = a.x.size(1);
  shape->H = a.w_hh.size(1);
  const int64_t gate_rows = gate_count(shape->cell) * shape->H;
  const int32_t dtype = torch_dtype(dtypes.of(a.w_ih));
  check_tensor(a.w_ih, "w_ih", dtype, {gate_rows, shape->I}, device);
  check_tensor(a.w_hh, "w_hh", dtype, {gate_rows, shape->H}, device);
  if (a.b_ih) {
    check_tensor(a.b_ih, "b_ih", dtype, {gate_rows}, device);
    check_tensor(a.b_hh, "b_hh", dtype, {gate_rows}, device);
  }
  if (a.h) dtypes.check(a.h, "h", {shape->B, shape->H}, device);
  if (a.c) dtypes.check(a.c, "c", {shape->B, shape->H}, device);
}

inline void check_cell_gradients(const CellBackwardArguments& a, const Dtypes& dtypes, const Device* device,
                                 const LayerShape& shape) {
  check_cell_state(shape.cell, a.dc, "dc");
  check_tensor(a.saved, "saved", torch_dtype(compute_type(shape.dtype)), {shape.B, shape.record()}, device);
  if (a.dh) dtypes.check(a.dh, "dh", {shape.B, shape.H}, device);
  if (a.dc) dtypes.check(a.dc, "dc", {shape.B, shape.H}, device);
}

}  // namespace dlk
