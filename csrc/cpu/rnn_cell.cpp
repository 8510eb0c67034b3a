// A cell is a sequence of one step in one direction, without the wrapping: [B, I] in, [B, H] out.
#include "../rnn_layout.h"
#include "rnn_boundary.h"

namespace dlk {
namespace {

struct CellCall {
  LayerShape shape{};
  DirectionWeights weights{};
  const void* h = nullptr;
  const void* c = nullptr;
  int32_t dtype = 0;
  Inputs inputs;

  bool has_work() const { return shape.B > 0 && shape.H > 0; }
  void check_state(const OptionalTensor& tensor, const char* what) const {
    if (tensor) check_tensor(tensor, what, dtype, {shape.B, shape.H});
  }
  const void* state(const OptionalTensor& tensor) { return tensor ? inputs.contiguous(tensor) : nullptr; }
};

void read_cell(CellKind cell, const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih,
               const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh, CellCall* call) {
  LayerShape& shape = call->shape;
  shape.cell = cell;
  shape.dtype = check_float(x, "x");
  call->dtype = x.dtype();
  DLK_CHECK(x.dim() == 2, "x must have shape [B, input_size], got ", shape_text(x));
  DLK_CHECK(w_hh.dim() == 2, "w_hh must have two dimensions, got shape ", shape_text(w_hh));
  DLK_CHECK(!b_ih == !b_hh, "b_ih and b_hh must both be given or both be None");
  check_cell_state(cell, c, "c");
  shape.T = shape.D = 1;
  shape.B = shape.rows = x.size(0);
  shape.I = x.size(1);
  shape.H = w_hh.size(1);
  const int64_t gates = gate_count(cell);
  check_tensor(w_ih, "w_ih", call->dtype, {gates * shape.H, shape.I});
  check_tensor(w_hh, "w_hh", call->dtype, {gates * shape.H, shape.H});
  if (b_ih) {
    check_tensor(b_ih, "b_ih", call->dtype, {gates * shape.H});
    check_tensor(b_hh, "b_hh", call->dtype, {gates * shape.H});
  }
  call->check_state(h, "h");
  call->check_state(c, "c");
}

// After the last check, so that nothing is copied for a call that is refused.
void take_arguments(const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih, const Tensor& w_hh,
                    const OptionalTensor& b_ih, const OptionalTensor& b_hh, CellCall* call) {
  call->weights.w_ih = call->inputs.contiguous(w_ih);
  call->weights.w_hh = call->inputs.contiguous(w_hh);
  if (b_ih) {
    call->weights.b_ih = call->inputs.contiguous(b_ih);
    call->weights.b_hh = call->inputs.contiguous(b_hh);
  }
  call->h = call->state(h);
  call->c = call->state(c);
}

// [B, F] as a [1, B, F].
RowTensor<const void*> one_step(const Tensor& tensor, Inputs* inputs) {
  RowTensor<const void*> rows = inputs->rows(tensor, /*t_dim=*/0, /*b_dim=*/0);
  rows.t = 0;
  return rows;
}

}  // namespace

TensorList cell_forward(CellKind cell, const Tensor& x, const OptionalTensor& h, const OptionalTensor& c,
                        const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                        bool save, bool deterministic) {
  CellCall call;
  read_cell(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, &call);
  const LayerShape& shape = call.shape;

  take_arguments(h, c, w_ih, w_hh, b_ih, b_hh, &call);
  ForwardParams params{};
  params.shape = shape;
  params.x = one_step(x, &call.inputs);
  params.h0 = call.h;
  params.c0 = call.c;
  params.weights[0] = call.weights;
  params.deterministic = deterministic;

  TensorList results;
  results.reserve(3);
  results.push_back(empty({shape.B, shape.H}, call.dtype));
  params.y = {results.back().data(), 0, shape.H};
  if (cell == CellKind::lstm) {
    results.push_back(empty({shape.B, shape.H}, call.dtype));
    params.c_n = results.back().data();
  }
  if (save && saved_slots(cell) > 0) {
    results.push_back(empty({shape.B, saved_slots(cell), shape.H}, torch_dtype(compute_type(shape.dtype))));
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
                         const OptionalTensor& b_ih, const OptionalTensor& b_hh, const Tensor& h_new,
                         const Tensor& saved, bool deterministic, bool need_x, bool need_state, bool need_weights,
                         bool gate_grads) {
  CellCall call;
  read_cell(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, &call);
  check_cell_state(cell, dc, "dc");
  const LayerShape& shape = call.shape;
  const int32_t compute = torch_dtype(compute_type(shape.dtype));
  check_tensor(h_new, "h_new", call.dtype, {shape.B, shape.H});
  if (saved_slots(cell) > 0) check_tensor(saved, "saved", compute, {shape.B, saved_slots(cell), shape.H});
  call.check_state(dh, "dh");
  call.check_state(dc, "dc");

  take_arguments(h, c, w_ih, w_hh, b_ih, b_hh, &call);
  BackwardParams params{};
  params.shape = shape;
  params.x = one_step(x, &call.inputs);
  params.h0 = call.h;
  params.c0 = call.c;
  params.weights[0] = call.weights;
  params.y = one_step(h_new, &call.inputs);
  if (saved_slots(cell) > 0) params.saved = call.inputs.contiguous(saved);
  if (dh) params.dy = one_step(dh, &call.inputs);
  params.dc_n = call.state(dc);
  params.deterministic = deterministic;

  const int64_t gate_rows = gate_count(cell) * shape.H;
  const bool bias = need_weights && b_ih;
  Output dx = output(need_x, {shape.B, shape.I}, call.dtype);
  Output dh0 = output(need_state, {shape.B, shape.H}, call.dtype);
  Output dc0 = output(need_state && cell == CellKind::lstm, {shape.B, shape.H}, call.dtype);
  Output dw_ih = output(need_weights, {gate_rows, shape.I}, call.dtype);
  Output dw_hh = output(need_weights, {gate_rows, shape.H}, call.dtype);
  Output db_ih = output(bias, {gate_rows}, call.dtype);
  Output db_hh = output(bias, {gate_rows}, call.dtype);
  params.dx = {dx.data, 0, shape.I};
  params.dh0 = dh0.data;
  params.dc0 = dc0.data;
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
