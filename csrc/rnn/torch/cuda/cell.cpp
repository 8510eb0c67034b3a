// The cell operators on CUDA tensors: two products by torch, one kernel for everything else.
#include "rnn/cuda/cell.h"
#include "ops.h"
#include "rnn/cuda/rows.h"

namespace dlk {
namespace {

struct CellCall : Call {
  CellCall(CellKind cell, const Tensor& x_given, const OptionalTensor& h_given, const OptionalTensor& c_given,
           const Tensor& w_ih_given, const Tensor& w_hh_given, const OptionalTensor& b_ih_given,
           const OptionalTensor& b_hh_given, const CallTypes& types)
      : Call(cell, x_given, types) {
    DLK_CHECK(x_given.dim() == 2, "x must have shape [B, input_size], got ", shape_text(x_given));
    DLK_CHECK(w_hh_given.dim() == 2, "w_hh must have two dimensions, got shape ", shape_text(w_hh_given));
    DLK_CHECK(!b_ih_given == !b_hh_given, "b_ih and b_hh must both be given or both be None");
    check_cell_state(cell, c_given, "c");
    shape.T = shape.D = 1;
    shape.B = shape.rows = x_given.size(0);
    shape.I = x_given.size(1);
    shape.H = w_hh_given.size(1);
    DLK_CHECK(shape.B < int64_t{1} << 31, "x has too many rows for the CUDA kernels: ", shape.B);
    of_weights = dtypes.of(w_ih_given);
    const int32_t weights_dtype = torch_dtype(of_weights);
    check_tensor(w_ih_given, "w_ih", weights_dtype, {gates(), shape.I}, &on.device());
    check_tensor(w_hh_given, "w_hh", weights_dtype, {gates(), shape.H}, &on.device());
    if (b_ih_given) {
      check_tensor(b_ih_given, "b_ih", weights_dtype, {gates()}, &on.device());
      check_tensor(b_hh_given, "b_hh", weights_dtype, {gates()}, &on.device());
    }
    check_states(h_given, "h");
    check_states(c_given, "c");
    of_x = x_given.dtype();
    of_h = h_given ? h_given.dtype() : of_x;
    of_c = c_given ? c_given.dtype() : of_x;
  }
  // After the last check, so that nothing is copied for a call that is refused.
  void take(const Tensor& x_given, const OptionalTensor& h_given, const OptionalTensor& c_given,
            const Tensor& w_ih_given, const Tensor& w_hh_given, const OptionalTensor& b_ih_given,
            const OptionalTensor& b_hh_given) {
    x = operand(x_given);
    w_ih = operand(w_ih_given);
    w_hh = operand(w_hh_given);
    h = operand_or_absent(h_given);
    c = operand_or_absent(c_given);
    b_ih = operand_or_absent(b_ih_given);
    b_hh = operand_or_absent(b_hh_given);
  }
  void check_states(const OptionalTensor& state, const char* what) const {
    if (state) check(state, what, {shape.B, shape.H});
  }
  bool has_work() const { return shape.B > 0 && shape.H > 0; }
  StepRows rows() const { return {0, 1, nullptr, nullptr, false}; }
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
  int32_t of_x, of_h, of_c;  // the dtypes of x and the states as they came, and of their gradients
};

}  // namespace

TensorList gpu_cell_forward(CellKind cell, const Tensor& x, const OptionalTensor& h, const OptionalTensor& c,
                            const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                            const OptionalTensor& b_hh, bool save, const CallTypes& types) {
  CellCall call(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, types);
  const LayerShape& shape = call.shape;
  const int32_t of_new_h = call.result_dtype(types.h, "h_dtype"), of_new_c = call.result_dtype(types.c, "c_dtype");
  call.take(x, h, c, w_ih, w_hh, b_ih, b_hh);
  TensorList results;
  results.push_back(call.on.empty({shape.B, shape.H}, call.dtype));
  if (call.lstm()) results.push_back(call.on.empty({shape.B, shape.H}, call.dtype));
  if (save) results.push_back(call.on.floats({shape.B, shape.record()}));
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
  if (save) p.saved = call.float_rows<float>(results.back(), shape.record());
  check_launch(launch_cell(p, shape.dtype, call.on.stream()));
  return returned();
}

TensorList gpu_cell_backward(CellKind cell, const OptionalTensor& dh_given, const OptionalTensor& dc_given,
                             const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, const Tensor& w_ih,
                             const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                             const Tensor& saved_given, bool need_x, bool need_state, bool need_weights,
                             bool gate_grads, const CallTypes& types) {
  CellCall call(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, types);
  const LayerShape& shape = call.shape;
  const int64_t B = shape.B, H = shape.H, gates = call.gates(), slots = call.slots();
  const bool lstm = call.lstm(), bias = need_weights && b_ih;
  const int32_t f32 = aoti_torch_dtype_float32(), of_weights = torch_dtype(call.of_weights);
  check_cell_state(cell, dc_given, "dc");
  check_tensor(saved_given, "saved", f32, {B, shape.record()}, &call.on.device());
  call.check_states(dh_given, "dh");
  call.check_states(dc_given, "dc");
  call.take(x, h, c, w_ih, w_hh, b_ih, b_hh);
  const OptionalTensor dh = call.operand_or_absent(dh_given), dc = call.operand_or_absent(dc_given);
  const Tensor saved = contiguous_as(saved_given, f32);

  TensorList grads;
  const auto output = [&](bool wanted, std::initializer_list<int64_t> sizes, int32_t dtype) {
    grads.push_back(wanted ? call.on.empty(sizes, dtype) : call.on.absent(dtype));
  };
  output(need_x, {B, shape.I}, call.of_x);
  output(need_state, {B, H}, call.of_h);
  output(need_state && lstm, {B, H}, call.dtype);
  output(need_weights, {gates, shape.I}, of_weights);
  output(need_weights, {gates, H}, of_weights);
  output(bias, {gates}, of_weights);
  output(bias, {gates}, of_weights);
  if (gate_grads) grads.push_back(call.on.floats({B, gate_grad_slots(cell), H}));
  // Of all gradients only dc comes from a kernel that knows but one dtype.
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
  const bool direct = cell == CellKind::gru;  // h also reaches h' past the gates
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
  if (lstm && need_state) p.new_dc = call.state_rows(grads[2].data());
  p.dgates = {dgates.data(), slots, call.f32()};
  if (gate_grads) p.gate_grads = call.float_rows<float>(grads.back(), slots);
  if (bias) {
    bias_sums = call.on.floats({segments, slots});
    p.bias_sums = static_cast<float*>(bias_sums.data());
    p.segment_stride = slots;
  }
  check_launch(launch_cell(p, shape.dtype, call.on.stream()));

  const Tensor input_side = matrix(dgates, B, gates, slots, 1);
  const Tensor& hidden_side = direct ? hidden : input_side;
  if (need_x) multiply(input_side, call.w_ih, grads[0]);
  if (need_state && !direct) multiply(hidden_side, call.w_hh, grads[1]);
  if (need_state && direct) {
    const Tensor product = call.on.floats({B, H});
    multiply(hidden_side, call.w_hh, product);
    const AddStates sum{B * H, static_cast<const float*>(carry.data()), static_cast<const float*>(product.data()),
                        grads[1].data()};
    check_launch(launch_add_states(sum, h ? call.dtypes.of(h) : call.dtypes.of(x), call.on.stream()));
  }
  if (need_weights) {
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

}  // namespace dlk
