// A cell is a sequence of one step in one direction, without the wrapping: [B, I] in, [B, H] out.
#include "layout.h"
#include "boundary.h"

namespace dlk {
namespace {

struct CellCall {
  LayerShape shape{};
  DirectionWeights weights{};
  RowTensor<const void*> x{};
  StateTensor<const void*> h{}, c{};
  Dtypes dtypes;
  Inputs inputs;

  bool has_work() const { return shape.B > 0 && shape.H > 0; }
  void check_state(const OptionalTensor& tensor, const char* what) const {
    if (tensor) dtypes.check(tensor, what, {shape.B, shape.H});
  }
  StateTensor<const void*> state(const OptionalTensor& tensor) {
    if (!tensor) return {};
    return {inputs.contiguous(tensor), dtypes.of(tensor)};
  }
  // [B, F] as a [1, B, F].
  RowTensor<const void*> one_step(const Tensor& tensor) {
    RowTensor<const void*> rows = inputs.rows(tensor, /*t_dim=*/0, /*b_dim=*/0, dtypes.of(tensor));
    rows.t = 0;
    return rows;
  }
};

void read_cell(CellKind cell, const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih,
               const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh, const CallTypes& types,
               CellCall* call) {
  LayerShape& shape = call->shape;
  shape.cell = cell;
  call->dtypes = Dtypes(check_float(x, "x"), types.product);
  shape.dtype = call->dtypes.product();
  shape.narrow = has_narrow_slots(shape.dtype);
  DLK_CHECK(x.dim() == 2, "x must have shape [B, input_size], got ", shape_text(x));
  DLK_CHECK(w_hh.dim() == 2, "w_hh must have two dimensions, got shape ", shape_text(w_hh));
  DLK_CHECK(!b_ih == !b_hh, "b_ih and b_hh must both be given or both be None");
  check_cell_state(cell, c, "c");
  shape.T = shape.D = 1;
  shape.B = shape.rows = x.size(0);
  shape.I = x.size(1);
  shape.H = w_hh.size(1);
  const int64_t gates = gate_count(cell);
  const DType of_weights = call->dtypes.of(w_ih);
  const int32_t dtype = torch_dtype(of_weights);
  call->weights.dtype = of_weights;
  check_tensor(w_ih, "w_ih", dtype, {gates * shape.H, shape.I});
  check_tensor(w_hh, "w_hh", dtype, {gates * shape.H, shape.H});
  if (b_ih) {
    check_tensor(b_ih, "b_ih", dtype, {gates * shape.H});
    check_tensor(b_hh, "b_hh", dtype, {gates * shape.H});
  }
  call->check_state(h, "h");
  call->check_state(c, "c");
}

// After the last check, so that nothing is copied for a call that is refused.
void take_arguments(const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih,
                    const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh, CellCall* call) {
  call->x = call->one_step(x);
  call->weights.w_ih = call->inputs.contiguous(w_ih);
  call->weights.w_hh = call->inputs.contiguous(w_hh);
  if (b_ih) {
    call->weights.b_ih = call->inputs.contiguous(b_ih);
    call->weights.b_hh = call->inputs.contiguous(b_hh);
  }
  call->h = call->state(h);
  call->c = call->state(c);
}

}  // namespace

TensorList cell_forward(CellKind cell, const Tensor& x, const OptionalTensor& h, const OptionalTensor& c,
                        const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                        bool save, bool deterministic, const CallTypes& types) {
  CellCall call;
  read_cell(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, types, &call);
  const LayerShape& shape = call.shape;
  const DType of_h = call.dtypes.result(types.h, "h_dtype"), of_c = call.dtypes.result(types.c, "c_dtype");

  take_arguments(x, h, c, w_ih, w_hh, b_ih, b_hh, &call);
  ForwardParams params{};
  params.shape = shape;
  params.x = call.x;
  params.h0 = call.h;
  params.c0 = call.c;
  params.weights[0] = call.weights;
  params.deterministic = deterministic;

  TensorList results;
  results.reserve(3);
  results.push_back(empty({shape.B, shape.H}, torch_dtype(of_h)));
  params.y = {results.back().data(), 0, shape.H, of_h};
  if (cell == CellKind::lstm) {
    results.push_back(empty({shape.B, shape.H}, torch_dtype(of_c)));
    params.c_n = {results.back().data(), of_c};
  }
  if (save) {
    results.push_back(empty({shape.B, shape.record()}, torch_dtype(compute_type(shape.dtype))));
    params.saved = results.back().data();
  }
  if (call.has_work()) {
    rnn_forward(params, current_runtime());
    remember_shape(shape);
  }
  return results;
}

TensorList cell_backward(CellKind cell, const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& x,
                         const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih, const Tensor& w_hh,
                         const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& saved,
                         bool deterministic, bool need_x, bool need_state, bool need_weights, bool gate_grads,
                         const CallTypes& types) {
  CellCall call;
  read_cell(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, types, &call);
  check_cell_state(cell, dc, "dc");
  const LayerShape& shape = call.shape;
  const int32_t compute = torch_dtype(compute_type(shape.dtype));
  check_tensor(saved, "saved", compute, {shape.B, shape.record()});
  call.check_state(dh, "dh");
  call.check_state(dc, "dc");

  take_arguments(x, h, c, w_ih, w_hh, b_ih, b_hh, &call);
  BackwardParams params{};
  params.shape = shape;
  params.x = call.x;
  params.h0 = call.h;
  params.c0 = call.c;
  params.weights[0] = call.weights;
  params.saved = call.inputs.contiguous(saved);
  if (dh) params.dy = call.one_step(dh);
  params.dc_n = call.state(dc);
  params.deterministic = deterministic;

  const int64_t gate_rows = gate_count(cell) * shape.H;
  const bool bias = need_weights && b_ih;
  const DType of_x = call.x.dtype, of_h = h ? call.h.dtype : of_x, of_c = c ? call.c.dtype : of_x;
  const int32_t of_weights = w_ih.dtype();
  Output dx = output(need_x, {shape.B, shape.I}, torch_dtype(of_x));
  Output dh0 = output(need_state, {shape.B, shape.H}, torch_dtype(of_h));
  Output dc0 = output(need_state && cell == CellKind::lstm, {shape.B, shape.H}, torch_dtype(of_c));
  Output dw_ih = output(need_weights, {gate_rows, shape.I}, of_weights);
  Output dw_hh = output(need_weights, {gate_rows, shape.H}, of_weights);
  Output db_ih = output(bias, {gate_rows}, of_weights);
  Output db_hh = output(bias, {gate_rows}, of_weights);
  params.dx = {dx.data, 0, shape.I, of_x};
  params.dh0 = {dh0.data, of_h};
  params.dc0 = {dc0.data, of_c};
  params.grads[0] = {dw_ih.data, dw_hh.data, db_ih.data, db_hh.data, nullptr};

  TensorList grads;
  grads.reserve(8);
  for (Output* out : {&dx, &dh0, &dc0, &dw_ih, &dw_hh, &db_ih, &db_hh}) grads.push_back(std::move(out->tensor));
  if (gate_grads) {
    grads.push_back(empty({shape.B, gate_grad_slots(cell), shape.H}, compute));
    params.gate_grads = grads.back().data();
  }

  if (call.has_work()) {
    rnn_backward(params, current_runtime());
    remember_shape(shape);
  } else {
    for (const Tensor& grad : grads) fill_with_zeros(grad);
  }
  return grads;
}

}  // namespace dlk
