// The cell operators: a cell is a sequence of one step in one direction, with tensors [B, I] in and [B, H] out.
#include "rnn/torch/checks.h"
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
  StateTensor<const void*> state(const OptionalTensor& tensor) {
    if (!tensor) return {};
    return {inputs.contiguous(tensor), dtypes.of(tensor)};
  }
  // A [B, F] tensor as [1, B, F].
  RowTensor<const void*> one_step(const Tensor& tensor) {
    RowTensor<const void*> rows = inputs.rows(tensor, /*t_dim=*/0, /*b_dim=*/0, dtypes.of(tensor));
    rows.t = 0;
    return rows;
  }
};

template <class Arguments>
void read_call(CellKind cell, const Arguments& a, CellCall* call) {
  LayerShape& shape = call->shape;
  shape.cell = cell;
  call->dtypes = Dtypes(check_float(a.x, "x"), a.product_dtype);
  shape.dtype = call->dtypes.product();
  shape.narrow = has_narrow_slots(shape.dtype);
  shape.one_step = true;
  read_cell(a, call->dtypes, nullptr, &shape);
}

// Called after the last check, so that nothing is copied for a call that is refused.
template <class Arguments>
void take_arguments(const Arguments& a, CellCall* call) {
  call->x = call->one_step(a.x);
  call->weights.dtype = call->dtypes.of(a.w_ih);
  call->weights.w_ih = call->inputs.contiguous(a.w_ih);
  call->weights.w_hh = call->inputs.contiguous(a.w_hh);
  if (a.b_ih) {
    call->weights.b_ih = call->inputs.contiguous(a.b_ih);
    call->weights.b_hh = call->inputs.contiguous(a.b_hh);
  }
  call->h = call->state(a.h);
  call->c = call->state(a.c);
}

}  // namespace

namespace on_cpu {

TensorList cell_forward(CellKind cell, const CellForwardArguments& a) {
  CellCall call;
  read_call(cell, a, &call);
  const LayerShape& shape = call.shape;
  const DType of_h = call.dtypes.result(a.h_dtype, "h_dtype"), of_c = call.dtypes.result(a.c_dtype, "c_dtype");

  take_arguments(a, &call);
  ForwardParams params{};
  params.shape = shape;
  params.x = call.x;
  params.h0 = call.h;
  params.c0 = call.c;
  params.weights[0] = call.weights;
  params.deterministic = a.deterministic;

  TensorList results;
  results.reserve(3);
  results.push_back(empty({shape.B, shape.H}, torch_dtype(of_h)));
  params.y = {results.back().data(), 0, shape.H, of_h};
  if (cell_traits(cell).cell_state) {
    results.push_back(empty({shape.B, shape.H}, torch_dtype(of_c)));
    params.c_n = {results.back().data(), of_c};
  }
  if (a.save) {
    results.push_back(empty({shape.B, shape.record()}, torch_dtype(compute_type(shape.dtype))));
    params.saved = results.back().data();
  }
  if (call.has_work()) {
    rnn_forward(params, current_runtime());
    remember_shape(shape);
  }
  return results;
}

TensorList cell_backward(CellKind cell, const CellBackwardArguments& a) {
  CellCall call;
  read_call(cell, a, &call);
  check_cell_gradients(a, call.dtypes, nullptr, call.shape);
  const LayerShape& shape = call.shape;
  const int32_t compute = torch_dtype(compute_type(shape.dtype));
  take_arguments(a, &call);
  BackwardParams params{};
  params.shape = shape;
  params.x = call.x;
  params.h0 = call.h;
  params.c0 = call.c;
  params.weights[0] = call.weights;
  params.saved = call.inputs.contiguous(a.saved);
  if (a.dh) params.dy = call.one_step(a.dh);
  params.dc_n = call.state(a.dc);
  params.deterministic = a.deterministic;

  const int64_t gate_rows = gate_count(cell) * shape.H;
  const bool bias = a.need_weights && a.b_ih;
  const DType of_x = call.x.dtype, of_h = a.h ? call.h.dtype : of_x, of_c = a.c ? call.c.dtype : of_x;
  const int32_t of_weights = a.w_ih.dtype();
  Output dx = output(a.need_x, {shape.B, shape.I}, torch_dtype(of_x));
  Output dh0 = output(a.need_state, {shape.B, shape.H}, torch_dtype(of_h));
  Output dc0 = output(a.need_state && cell_traits(cell).cell_state, {shape.B, shape.H}, torch_dtype(of_c));
  Output dw_ih = output(a.need_weights, {gate_rows, shape.I}, of_weights);
  Output dw_hh = output(a.need_weights, {gate_rows, shape.H}, of_weights);
  Output db_ih = output(bias, {gate_rows}, of_weights);
  Output db_hh = output(bias, {gate_rows}, of_weights);
  params.dx = {dx.data, 0, shape.I, of_x};
  params.dh0 = {dh0.data, of_h};
  params.dc0 = {dc0.data, of_c};
  params.grads[0] = {dw_ih.data, dw_hh.data, db_ih.data, db_hh.data, nullptr};

  TensorList grads;
  grads.reserve(8);
  for (Output* out : {&dx, &dh0, &dc0, &dw_ih, &dw_hh, &db_ih, &db_hh}) grads.push_back(std::move(out->tensor));
  if (a.gate_grads) {
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

}  // namespace on_cpu
}  // namespace dlk
