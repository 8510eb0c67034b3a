// The cell operators on CUDA tensors: two products by torch, one kernel for everything else.
#include "rnn/cuda/cell.h"
#include "rnn/cuda/rows.h"
#include "rnn/torch/cuda/call.h"
#include "rnn/torch/ops.h"

namespace dlk {
namespace {

struct CellCall : Call {
  template <class Arguments>
  CellCall(CellKind cell, const Arguments& a) : Call(cell, a.x, a.product_dtype) {
    read_cell(a, dtypes, &on.device(), &shape);
    DLK_CHECK(shape.B < int64_t{1} << 31, "x has too many rows for the CUDA kernels: ", shape.B);
    of_weights = dtypes.of(a.w_ih);
    of_x = a.x.dtype();
    of_h = a.h ? a.h.dtype() : of_x;
    of_c = a.c ? a.c.dtype() : of_x;
  }
  // Called after the last check, so that nothing is copied for a call that is refused.
  template <class Arguments>
  void take(const Arguments& a) {
    x = operand(a.x);
    w_ih = operand(a.w_ih);
    w_hh = operand(a.w_hh);
    h = operand_or_absent(a.h);
    c = operand_or_absent(a.c);
    b_ih = operand_or_absent(a.b_ih);
    b_hh = operand_or_absent(a.b_hh);
  }
  bool has_work() const { return shape.B > 0 && shape.H > 0; }
  StepRows rows() const { return {0, 1, nullptr, nullptr, false, nullptr}; }
  template <class Pointer>
  StateRows<Pointer> state_rows(Pointer data) const {
    return {data, shape.H, f32()};
  }
  template <class Float>
  StateRows<Float*> float_rows(const Tensor& tensor, int64_t features) const {
    return {static_cast<Float*>(tensor.data()), features, true};
  }

  Tensor x, w_ih, w_hh;
  OptionalTensor h, c, b_ih, b_hh;
  DType of_weights;
  int32_t of_x, of_h, of_c;  // the dtypes of x and the states as the caller passed them, and of their gradients
};

}  // namespace

namespace on_cuda {

TensorList cell_forward(CellKind cell, const CellForwardArguments& a) {
  CellCall call(cell, a);
  const LayerShape& shape = call.shape;
  const int32_t of_new_h = call.result_dtype(a.h_dtype, "h_dtype"), of_new_c = call.result_dtype(a.c_dtype, "c_dtype");
  call.take(a);
  TensorList results;
  results.push_back(call.on.empty({shape.B, shape.H}, call.dtype));
  if (call.lstm()) results.push_back(call.on.empty({shape.B, shape.H}, call.dtype));
  if (a.save) results.push_back(call.on.floats({shape.B, shape.record()}));
  const auto returned = [&] {
    results[0] = returned_as(std::move(results[0]), of_new_h);
    if (call.lstm()) results[1] = returned_as(std::move(results[1]), of_new_c);
    return std::move(results);
  };
  if (!call.has_work()) return returned();

  const Tensor gates_x = call.on.floats({shape.B, call.gates()}), gates_h = call.on.floats({shape.B, call.gates()});
  multiply(call.x, transposed(call.w_ih), gates_x);
  if (call.h) {
    multiply(call.h, transposed(call.w_hh), gates_h);
  } else {
    zero(gates_h);
  }
  CellForward p{};
  p.cell = cell;
  p.B = static_cast<int>(shape.B), p.H = static_cast<int>(shape.H);
  p.rows = call.rows();
  p.gates_x = call.float_rows<const float>(gates_x, call.gates());
  p.gates_h = call.float_rows<const float>(gates_h, call.gates());
  p.b_ih = pointer(call.b_ih);
  p.b_hh = pointer(call.b_hh);
  p.state = call.state_rows(pointer(call.lstm() ? call.c : call.h));
  p.h = call.state_rows(results[0].data());
  if (call.lstm()) p.new_state = call.state_rows(results[1].data());
  if (a.save) p.saved = call.float_rows<float>(results.back(), shape.record());
  check_launch(launch_cell(p, shape.dtype, call.on.stream()));
  return returned();
}

TensorList cell_backward(CellKind cell, const CellBackwardArguments& a) {
  CellCall call(cell, a);
  check_cell_gradients(a, call.dtypes, &call.on.device(), call.shape);
  const LayerShape& shape = call.shape;
  const int64_t B = shape.B, H = shape.H, gates = call.gates(), slots = call.slots();
  const bool lstm = call.lstm(), bias = a.need_weights && a.b_ih;
  const int32_t f32 = aoti_torch_dtype_float32(), of_weights = torch_dtype(call.of_weights);
  call.take(a);
  const OptionalTensor dh = call.operand_or_absent(a.dh), dc = call.operand_or_absent(a.dc);
  const Tensor saved = contiguous_as(a.saved, f32);

  TensorList grads;
  const auto output = [&](bool wanted, std::initializer_list<int64_t> sizes, int32_t dtype) {
    grads.push_back(wanted ? call.on.empty(sizes, dtype) : call.on.absent(dtype));
  };
  output(a.need_x, {B, shape.I}, call.of_x);
  output(a.need_state, {B, H}, call.of_h);
  output(a.need_state && lstm, {B, H}, call.dtype);
  output(a.need_weights, {gates, shape.I}, of_weights);
  output(a.need_weights, {gates, H}, of_weights);
  output(bias, {gates}, of_weights);
  output(bias, {gates}, of_weights);
  if (a.gate_grads) grads.push_back(call.on.floats({B, gate_grad_slots(cell), H}));
  // Only the gradient of c is written by a kernel in the kernels' dtype; the others already have their final dtype.
  const auto returned = [&] {
    grads[2] = returned_as(std::move(grads[2]), call.of_c);
    return std::move(grads);
  };
  if (!call.has_work()) {
    for (const Tensor& grad : grads) zero(grad);
    return returned();
  }

  const Tensor dgates = call.on.empty({B, slots}, call.dtype);
  const int segments = ceil_div(static_cast<int>(B), kSegmentRows);
  const bool direct = cell_traits(cell).direct_path;  // h' also depends on h directly
  Tensor carry, hidden, bias_sums;
  CellBackward p{};
  p.cell = cell;
  p.B = static_cast<int>(B), p.H = static_cast<int>(H);
  p.rows = call.rows();
  p.saved = call.float_rows<const float>(saved, shape.record());
  p.first = call.state_rows(pointer(lstm ? call.c : call.h));
  p.dy = call.state_rows(pointer(dh));
  if (direct) {
    carry = call.on.floats({B, H});
    hidden = call.on.empty({B, gates}, call.dtype);
    zero(carry);
    p.carry = call.float_rows<float>(carry, H);
    p.hidden = {hidden.data(), gates, call.f32()};
  }
  p.dc = call.state_rows(pointer(dc));
  if (lstm && a.need_state) p.new_dc = call.state_rows(grads[2].data());
  p.dgates = {dgates.data(), slots, call.f32()};
  if (a.gate_grads) p.gate_grads = call.float_rows<float>(grads.back(), slots);
  if (bias) {
    bias_sums = call.on.floats({segments, slots});
    p.bias_sums = static_cast<float*>(bias_sums.data());
    p.segment_stride = slots;
  }
  check_launch(launch_cell(p, shape.dtype, call.on.stream()));

  const Tensor input_side = matrix(dgates, B, gates, slots, 1);
  const Tensor& hidden_side = direct ? hidden : input_side;
  if (a.need_x) multiply(input_side, call.w_ih, grads[0]);
  if (a.need_state && !direct) multiply(hidden_side, call.w_hh, grads[1]);
  if (a.need_state && direct) {
    const Tensor product = call.on.floats({B, H});
    multiply(hidden_side, call.w_hh, product);
    const AddStates sum{B * H, static_cast<const float*>(carry.data()), static_cast<const float*>(product.data()),
                        grads[1].data()};
    check_launch(launch_add_states(sum, call.dtypes.of(a.h ? a.h : a.x), call.on.stream()));
  }
  if (a.need_weights) {
    multiply(transposed(input_side), call.x, grads[3]);
    if (call.h) {
      multiply(transposed(hidden_side), call.h, grads[4]);
    } else {
      zero(grads[4]);
    }
  }
  if (bias) {
    const BiasSums sums{cell, p.H, segments, slots, p.bias_sums, grads[5].data(), grads[6].data()};
    check_launch(launch_bias_sums(sums, call.of_weights, call.on.stream()));
  }
  return returned();
}

}  // namespace on_cuda
}  // namespace dlk
