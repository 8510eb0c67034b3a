#include "isa/dispatch.h"
#include "rnn_boundary.h"

namespace dlk {
namespace {

// The arguments that forward and backward have in common, checked.
struct Sequence {
  LayerShape shape{};
  DirectionWeights weights[2]{};
  const int64_t* batch_sizes = nullptr;
  const int64_t* lengths = nullptr;
  Dtypes dtypes;
  int t_dim = 0, b_dim = 1;
  Inputs inputs;

  bool is_packed() const { return batch_sizes != nullptr; }

  // [T, B, features] or [B, T, features] or [rows, features], as x; time comes first in memory, as in torch.
  Tensor empty_rows(int64_t features, DType dtype) const {
    if (is_packed()) return empty({shape.rows, features}, torch_dtype(dtype));
    if (b_dim == 1) return empty({shape.T, shape.B, features}, torch_dtype(dtype));
    const int64_t sizes[] = {shape.B, shape.T, features}, strides[] = {features, shape.B * features, 1};
    return empty_strided(sizes, strides, 3, torch_dtype(dtype));
  }

  // Checks and reads such a tensor.
  RowTensor<const void*> rows(const Tensor& tensor, const char* what, int64_t features) {
    const DType dtype = is_packed()  ? dtypes.check(tensor, what, {shape.rows, features})
                        : b_dim == 1 ? dtypes.check(tensor, what, {shape.T, shape.B, features})
                                     : dtypes.check(tensor, what, {shape.B, shape.T, features});
    return inputs.rows(tensor, t_dim, is_packed() ? -1 : b_dim, dtype);
  }

  // A per-direction array of [rows, ...], time-major even where x is not.
  Tensor empty_records(bool wanted, std::initializer_list<int64_t> record) const {
    const int32_t type = torch_dtype(compute_type(shape.dtype));
    if (!wanted) return absent(type);
    int64_t sizes[5] = {shape.D};
    int64_t dim = 1;
    if (is_packed()) {
      sizes[dim++] = shape.rows;
    } else {
      sizes[dim++] = shape.T;
      sizes[dim++] = shape.B;
    }
    for (int64_t size : record) sizes[dim++] = size;
    return empty(sizes, dim, type);
  }

  RowTensor<void*> output_rows(const Tensor& tensor, DType dtype) const {
    const int64_t* strides = tensor.strides();
    return {tensor.data(), strides[t_dim], is_packed() ? 0 : strides[b_dim], dtype};
  }
};

// How many tensors of `weights` belong to a direction; fills I, H, P and checks every shape.
void read_weights(const TensorList& weights, int64_t features, Sequence* call) {
  LayerShape& shape = call->shape;
  const size_t count = weights.size() / static_cast<size_t>(shape.D);
  DLK_CHECK(weights.size() % static_cast<size_t>(shape.D) == 0 && count >= 2 && count <= 5, "weights must hold ",
            shape.D == 2 ? "two directions of " : "", "w_ih, w_hh[, b_ih, b_hh][, w_hr], got ", weights.size(),
            " tensors");
  const bool bias = count >= 4, projected = count % 2 == 1;
  DLK_CHECK(!projected || shape.cell == CellKind::lstm, "weights: only lstm has projections, ", mode_name(shape.cell),
            " takes 2 or 4 tensors per direction, got ", count);

  const int64_t gates = gate_count(shape.cell);
  DLK_CHECK(weights[1].dim() == 2 && weights[1].size(0) % gates == 0, "w_hh must have shape [", gates,
            " * hidden_size, ...], got ", shape_text(weights[1]));
  shape.I = features;
  shape.H = weights[1].size(0) / gates;
  DLK_CHECK(shape.H > 0, "hidden_size must be positive, got weights of shape ", shape_text(weights[1]));
  if (projected) {
    const Tensor& w_hr = weights[count - 1];
    DLK_CHECK(w_hr.dim() == 2 && w_hr.size(0) > 0, "w_hr must have shape [proj_size, hidden_size], got ",
              shape_text(w_hr));
    shape.P = w_hr.size(0);
  }
  for (int d = 0; d < shape.D; ++d) {
    const Tensor* w = &weights[static_cast<size_t>(d) * count];
    DirectionWeights& into = call->weights[d];
    into.dtype = call->dtypes.check(w[0], "w_ih", {gates * shape.H, shape.I});
    const int32_t dtype = weights[0].dtype();
    check_tensor(w[0], "w_ih", dtype, {gates * shape.H, shape.I});
    check_tensor(w[1], "w_hh", dtype, {gates * shape.H, shape.outputs()});
    into.w_ih = call->inputs.contiguous(w[0]);
    into.w_hh = call->inputs.contiguous(w[1]);
    if (bias) {
      check_tensor(w[2], "b_ih", dtype, {gates * shape.H});
      check_tensor(w[3], "b_hh", dtype, {gates * shape.H});
      into.b_ih = call->inputs.contiguous(w[2]);
      into.b_hh = call->inputs.contiguous(w[3]);
    }
    if (projected) {
      check_tensor(w[count - 1], "w_hr", dtype, {shape.P, shape.H});
      into.w_hr = call->inputs.contiguous(w[count - 1]);
    }
  }
}

const int64_t* read_integers(const Tensor& tensor, const char* what, Inputs* inputs) {
  DLK_CHECK(tensor.dim() == 1, what, " must be one-dimensional, got shape ", shape_text(tensor));
  check_tensor(tensor, what, aoti_torch_dtype_int64(), {tensor.numel()});
  return static_cast<const int64_t*>(inputs->contiguous(tensor));
}

void read_batch_sizes(const OptionalTensor& batch_sizes, const Tensor& x, Sequence* call) {
  DLK_CHECK(x.dim() == 2, "x must be packed data of shape [rows, input_size] with batch_sizes, got ", shape_text(x));
  const int64_t* sizes = read_integers(batch_sizes, "batch_sizes", &call->inputs);
  LayerShape& shape = call->shape;
  shape.T = batch_sizes.numel();
  shape.rows = x.size(0);
  DLK_CHECK(shape.T > 0, "batch_sizes must not be empty");
  shape.B = sizes[0];
  int64_t rows = 0;
  for (int64_t t = 0; t < shape.T; ++t) {
    DLK_CHECK(sizes[t] > 0 && sizes[t] <= (t ? sizes[t - 1] : shape.rows),
              "batch_sizes must be positive and must not increase, got ", sizes[t], " at step ", t,
              t ? concat(" after ", sizes[t - 1]) : concat(" for ", shape.rows, " rows"));
    rows += sizes[t];
  }
  DLK_CHECK(rows == shape.rows, "batch_sizes must sum to the rows of x, got ", rows, " and ", shape.rows);
  call->batch_sizes = sizes;
}

void read_padded(const OptionalTensor& lengths, const Tensor& x, bool batch_first, Sequence* call) {
  DLK_CHECK(x.dim() == 3, "x must have shape ", batch_first ? "[B, T, input_size]" : "[T, B, input_size]", ", got ",
            shape_text(x));
  LayerShape& shape = call->shape;
  call->t_dim = batch_first ? 1 : 0;
  call->b_dim = batch_first ? 0 : 1;
  shape.T = x.size(call->t_dim);
  shape.B = x.size(call->b_dim);
  shape.rows = shape.T * shape.B;
  DLK_CHECK(shape.T > 0, "x must have at least one time step, got shape ", shape_text(x));
  if (!lengths) return;
  const int64_t* values = read_integers(lengths, "lengths", &call->inputs);
  DLK_CHECK(lengths.numel() == shape.B, "lengths must have shape [", shape.B, "], got ", shape_text(lengths));
  for (int64_t b = 0; b < shape.B; ++b) {
    DLK_CHECK_VALUE(values[b] >= 0 && values[b] <= shape.T, "lengths must lie in 0..T (T=", shape.T, "), got ",
                    values[b], " at position ", b);
  }
  call->lengths = values;
}

void read_sequence(CellKind cell, const Tensor& x, const TensorList& weights, const OptionalTensor& batch_sizes,
                   const OptionalTensor& lengths, bool bidirectional, bool batch_first, const CallTypes& types,
                   Sequence* call) {
  call->shape.cell = cell;
  call->dtypes = Dtypes(check_float(x, "x"), types.product);
  call->shape.dtype = call->dtypes.product();
  call->shape.D = bidirectional ? 2 : 1;
  DLK_CHECK(!(batch_sizes && lengths), "lengths are for padded x, batch_sizes for packed x: give one of them");
  if (batch_sizes) {
    read_batch_sizes(batch_sizes, x, call);
  } else {
    read_padded(lengths, x, batch_first, call);
  }
  read_weights(weights, x.size(x.dim() - 1), call);
}

StateTensor<const void*> read_state(const OptionalTensor& state, const char* what, int64_t size, Sequence* call) {
  if (!state) return {};
  const DType dtype = call->dtypes.check(state, what, {call->shape.D, call->shape.B, size});
  return {call->inputs.contiguous(state), dtype};
}

const void* read_packed(const Tensor& packed, Isa isa, Sequence* call) {
  DLK_CHECK(packed.on_cpu() && packed.dtype() == aoti_torch_dtype_uint8() && packed.dim() == 1,
            "packed must be what the op `pack` returned: one-dimensional, uint8, on the CPU");
  const void* data = call->inputs.aligned(packed);
  DLK_CHECK(rnn_packed_matches(data, packed.byte_count(), call->shape, isa),
            "packed does not fit: it was packed for another cell, size, dtype or instruction set than this ",
            mode_name(call->shape.cell), " on ", isa_name(isa), "; pack the weights again");
  return data;
}

void check_cell_state(CellKind cell, const OptionalTensor& c, const char* what) {
  DLK_CHECK(cell == CellKind::lstm || !c, what, " must be None: ", mode_name(cell), " has no cell state");
}

void* data_if(bool wanted, const Tensor& tensor) { return wanted ? tensor.data() : nullptr; }

}  // namespace

SequenceOutputs sequence_forward(CellKind cell, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                 const TensorList& weights, const OptionalTensor& packed,
                                 const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool bidirectional,
                                 bool batch_first, bool save, bool deterministic, const CallTypes& types) {
  Sequence call;
  read_sequence(cell, x, weights, batch_sizes, lengths, bidirectional, batch_first, types, &call);
  check_cell_state(cell, c0, "c0");
  const LayerShape& shape = call.shape;
  const Runtime runtime = current_runtime();

  ForwardParams params{};
  params.shape = shape;
  params.x = call.rows(x, "x", shape.I);
  params.h0 = read_state(h0, "h0", shape.outputs(), &call);
  params.c0 = read_state(c0, "c0", shape.H, &call);
  params.weights[0] = call.weights[0];
  params.weights[1] = call.weights[1];
  if (packed) params.packed = read_packed(packed, runtime.isa, &call);
  params.batch_sizes = call.batch_sizes;
  params.lengths = call.lengths;
  params.deterministic = deterministic;

  const bool lstm = cell == CellKind::lstm;
  const DType h_dtype = call.dtypes.output(types.h, "h_dtype"), c_dtype = call.dtypes.output(types.c, "c_dtype");
  Tensor y = call.empty_rows(shape.D * shape.outputs(), h_dtype);
  Tensor h_n = empty({shape.D, shape.B, shape.outputs()}, torch_dtype(h_dtype));
  Tensor c_n = lstm ? empty({shape.D, shape.B, shape.H}, torch_dtype(c_dtype)) : absent(torch_dtype(h_dtype));
  Tensor saved = call.empty_records(save, {shape.record()});
  if (shape.B > 0) {
    params.y = call.output_rows(y, h_dtype);
    params.h_n = {h_n.data(), h_dtype};
    params.c_n = {data_if(lstm, c_n), c_dtype};
    params.saved = data_if(save, saved);
    rnn_forward(params, runtime);
    remember_shape(shape);
  }
  return {std::move(y), std::move(h_n), std::move(c_n), std::move(saved)};
}

TensorList sequence_backward(CellKind cell, const OptionalTensor& dy, const OptionalTensor& dh_n,
                             const OptionalTensor& dc_n, const Tensor& x, const OptionalTensor& h0,
                             const OptionalTensor& c0, const TensorList& weights, const Tensor& saved,
                             const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool bidirectional,
                             bool batch_first, int64_t bptt_steps, bool deterministic, bool need_x, bool need_state,
                             bool need_weights, bool gate_grads, const CallTypes& types) {
  Sequence call;
  read_sequence(cell, x, weights, batch_sizes, lengths, bidirectional, batch_first, types, &call);
  check_cell_state(cell, c0, "c0");
  check_cell_state(cell, dc_n, "dc_n");
  DLK_CHECK_VALUE(bptt_steps >= 0, "bptt_steps must not be negative, got ", bptt_steps);
  const LayerShape& shape = call.shape;
  const bool lstm = cell == CellKind::lstm;

  BackwardParams params{};
  params.shape = shape;
  params.x = call.rows(x, "x", shape.I);
  params.h0 = read_state(h0, "h0", shape.outputs(), &call);
  params.c0 = read_state(c0, "c0", shape.H, &call);
  params.weights[0] = call.weights[0];
  params.weights[1] = call.weights[1];
  params.batch_sizes = call.batch_sizes;
  params.lengths = call.lengths;
  const int32_t compute = torch_dtype(compute_type(shape.dtype));
  if (call.is_packed()) {
    check_tensor(saved, "saved", compute, {shape.D, shape.rows, shape.record()});
  } else {
    check_tensor(saved, "saved", compute, {shape.D, shape.T, shape.B, shape.record()});
  }
  params.saved = call.inputs.contiguous(saved);
  if (dy) params.dy = call.rows(dy, "dy", shape.D * shape.outputs());
  params.dh_n = read_state(dh_n, "dh_n", shape.outputs(), &call);
  params.dc_n = read_state(dc_n, "dc_n", shape.H, &call);
  params.bptt_steps = bptt_steps;
  params.deterministic = deterministic;

  TensorList grads;
  grads.reserve(weights.size() + 5);
  grads.push_back(need_x ? empty_like(x) : absent(x.dtype()));
  if (need_x) params.dx = call.output_rows(grads.back(), params.x.dtype);
  const DType h0_dtype = h0 ? params.h0.dtype : params.x.dtype, c0_dtype = c0 ? params.c0.dtype : params.x.dtype;
  Output dh0 = output(need_state, {shape.D, shape.B, shape.outputs()}, torch_dtype(h0_dtype));
  Output dc0 = output(need_state && lstm, {shape.D, shape.B, shape.H}, torch_dtype(c0_dtype));
  params.dh0 = {dh0.data, h0_dtype};
  params.dc0 = {dc0.data, c0_dtype};
  grads.push_back(std::move(dh0.tensor));
  grads.push_back(std::move(dc0.tensor));
  for (const Tensor& weight : weights) grads.push_back(need_weights ? empty_like(weight) : absent(weight.dtype()));
  if (need_weights) {
    const size_t count = weights.size() / static_cast<size_t>(shape.D);
    for (int d = 0; d < shape.D; ++d) {
      const Tensor* w = &grads[3 + static_cast<size_t>(d) * count];
      const bool bias = count >= 4, projected = count % 2 == 1;
      params.grads[d] = {w[0].data(), w[1].data(), bias ? w[2].data() : nullptr, bias ? w[3].data() : nullptr,
                         projected ? w[count - 1].data() : nullptr};
    }
  }
  if (gate_grads) {
    grads.push_back(call.empty_records(true, {gate_grad_slots(cell), shape.H}));
    params.gate_grads = grads.back().data();
    grads.push_back(call.empty_records(shape.P > 0, {shape.P}));
    params.proj_grads = data_if(shape.P > 0, grads.back());
  }

  if (shape.B > 0) {
    rnn_backward(params, current_runtime());
    remember_shape(shape);
  } else {
    for (const Tensor& grad : grads) fill_with_zeros(grad);
  }
  return grads;
}

Tensor pack_weights(const std::string& mode, const TensorList& weights, bool bidirectional) {
  DLK_CHECK(!weights.empty() && weights[0].dim() == 2, "weights must begin with w_ih of two dimensions");
  Sequence call;
  call.shape.cell = cell_from_mode(mode);
  call.shape.dtype = check_float(weights[0], "w_ih");
  call.dtypes = Dtypes(call.shape.dtype, -1);
  call.shape.D = bidirectional ? 2 : 1;
  read_weights(weights, weights[0].size(1), &call);
  const Isa isa = current_isa();
  const int64_t bytes = static_cast<int64_t>(rnn_packed_bytes(call.shape, isa));
  Tensor packed = empty({bytes}, aoti_torch_dtype_uint8());
  rnn_pack(call.shape, call.weights, isa, packed.data());
  return packed;
}

}  // namespace dlk
