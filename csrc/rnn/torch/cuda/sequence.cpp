// The sequence operators on CUDA tensors: they check, allocate, plan, and run torch's products before and after the
// recurrent kernels of rnn/cuda.
//
// Every launch goes to torch's current stream; nothing waits for the device and no value is read from it.
#include "rnn/cuda/plan_cap.h"
#include "rnn/cuda/steps.h"
#include "rnn/torch/cuda/gradient_products.h"
#include "rnn/torch/cuda/sequence_call.h"
#include "rnn/torch/ops.h"

namespace dlk {
namespace {

// The device memory through which the blocks of a grid plan communicate. It must live until the kernel is launched.
struct GroupMemory {
  Tensor exchange, counters;
  GroupMemory(const SequenceCall& call, const SequencePlan& plan) {
    if (plan.kind != SequencePlan::grid) return;
    exchange = call.on.empty({int64_t{kGridBuffers} * plan.groups * plan.tile * plan.layout.stride}, call.dtype);
    counters = call.on.empty({plan.groups}, aoti_torch_dtype_int32());
  }
  template <class Params>
  void give(Params* params) const {
    if (!exchange.get()) return;
    params->exchange = exchange.data();
    params->counters = static_cast<unsigned*>(counters.data());
  }
};

// The fields that SequenceForward and SequenceBackward have in common.
template <class Params>
Params common_params(const SequenceCall& call, const OptionalTensor& h0, const OptionalTensor& c0,
                     const SequencePlan& plan) {
  const LayerShape& shape = call.shape;
  Params p{};
  p.cell = shape.cell;
  p.T = static_cast<int>(shape.T), p.B = static_cast<int>(shape.B), p.H = static_cast<int>(shape.H), p.D = shape.D;
  p.tile = plan.tile;
  p.layout = plan.layout;
  if (call.is_packed()) p.offsets = static_cast<const int*>(call.offsets.data());
  if (call.has_lengths) p.lengths = static_cast<const int64_t*>(call.lengths.data());
  p.resets = call.flags();
  for (int d = 0; d < shape.D; ++d) p.w_hh[d] = call.weights[d].w_hh.data();
  p.h0 = pointer(h0);
  p.c0 = pointer(c0);
  p.saved_rows = shape.rows;
  return p;
}

}  // namespace

namespace on_cuda {

SequenceOutputs sequence_forward(CellKind cell, const SequenceForwardArguments& a) {
  DLK_CHECK(!a.packed, "prepacked weights are for the CPU");
  SequenceCall call(cell, a.x, a.product_dtype);
  read_call(a, &call);
  check_cells_exist(cell, a.cells);
  const int32_t of_h = call.result_dtype(a.h_dtype, "h_dtype"), of_c = call.result_dtype(a.c_dtype, "c_dtype");
  take_arguments(a, true, &call);
  const OptionalTensor h0 = call.operand_or_absent(a.h0), c0 = call.operand_or_absent(a.c0);
  const LayerShape& shape = call.shape;
  const bool lstm = call.lstm();

  Tensor y = call.empty_rows(shape.D * shape.H);
  Tensor h_n = call.on.empty({shape.D, shape.B, shape.H}, call.dtype);
  Tensor c_n = lstm ? call.on.empty({shape.D, shape.B, shape.H}, call.dtype) : call.on.absent(of_h);
  Tensor saved = a.save ? call.empty_records(shape.record()) : call.on.absent(aoti_torch_dtype_float32());
  Tensor cells = a.cells ? call.empty_rows(shape.D * shape.H) : call.on.absent(of_c);
  if (shape.B > 0) {
    const SequencePlan plan = sequence_plan(shape, capped(gpu_limits(call.on.device().index)), false);
    SequenceForward p = common_params<SequenceForward>(call, h0, c0, plan);
    const Tensor inputs = matrix(call.x, shape.rows, shape.I);
    Tensor gates[2];
    for (int d = 0; d < shape.D; ++d) {
      gates[d] = call.on.floats({shape.rows, call.gates()});
      multiply(inputs, transposed(call.weights[d].w_ih), gates[d]);
      p.gates[d] = call.rows(static_cast<const float*>(gates[d].data()), call.gates(), DType::f32);
      if (call.weights[d].bias) {
        p.b_ih[d] = call.weights[d].b_ih.data();
        p.b_hh[d] = call.weights[d].b_hh.data();
      }
    }
    p.y = call.strided_rows<void*>(y);
    if (a.cells) p.cells = cells.data();
    p.h_n = h_n.data();
    if (lstm) p.c_n = c_n.data();
    if (a.save) p.saved = static_cast<float*>(saved.data());
    if (plan.kind != SequencePlan::steps) {
      const GroupMemory memory(call, plan);
      memory.give(&p);
      check_launch(launch_sequence(p, shape.dtype, plan, call.on.stream()));
    } else {
      copy_or_zero(h_n, h0);
      if (lstm) copy_or_zero(c_n, c0);
      const Tensor gates_h = call.on.floats({shape.B, call.gates()});
      const Tensor state = call.on.floats({shape.D, shape.B, shape.H});
      copy(state, lstm ? c_n : h_n);
      const ForwardSteps steps{call.host_sizes(), static_cast<float*>(gates_h.data()),
                               static_cast<float*>(state.data())};
      const auto product = [&](int d) {
        const Tensor h = matrix(h_n, shape.B, shape.H, shape.H, 1, d * shape.B * shape.H);
        multiply(h, transposed(call.weights[d].w_hh), gates_h);
        return 0;
      };
      check_launch(run_forward_steps(p, steps, shape.dtype, product, call.on.stream()));
    }
  }
  return {returned_as(std::move(y), of_h), returned_as(std::move(h_n), of_h),
          returned_as(std::move(c_n), lstm ? of_c : of_h), std::move(saved),
          returned_as(std::move(cells), lstm ? of_c : of_h)};
}

}  // namespace on_cuda

namespace {

// Computes dx and the weight gradients from the gate gradients. dgates[d] is [rows, slots * H], rows in the order of x.
void products_of_gate_grads(const SequenceCall& call, const Tensor* dgates, const Tensor& saved,
                            const OptionalTensor& h0, const Tensor* dx, DType of_dx, Tensor* const* dweights) {
  const LayerShape& shape = call.shape;
  const int64_t gates = call.gates(), slots = call.slots(), H = shape.H;
  // The first slots are those of the input side, in the order of w_ih's rows.
  Tensor input_side[2];
  for (int d = 0; d < shape.D; ++d) input_side[d] = matrix(dgates[d], shape.rows, gates, slots, 1);
  if (dx) input_gradient(call, input_side, *dx, of_dx);
  if (!dweights) return;

  const Tensor inputs = alive_inputs(call);
  const Tensor before = call.on.empty({shape.rows, H}, call.dtype);
  HiddenBefore hidden{};
  hidden.cell = shape.cell;
  hidden.T = static_cast<int>(shape.T), hidden.B = static_cast<int>(shape.B), hidden.H = static_cast<int>(H);
  if (call.is_packed()) hidden.offsets = static_cast<const int*>(call.offsets.data());
  if (call.has_lengths) hidden.lengths = static_cast<const int64_t*>(call.lengths.data());
  hidden.resets = call.flags();
  hidden.to = call.rows(before.data(), H, shape.dtype);
  for (int d = 0; d < shape.D; ++d) {
    multiply(transposed(input_side[d]), inputs, *dweights[2 * d]);
    hidden.reverse = d == 1;
    hidden.saved = static_cast<const float*>(saved.data()) + d * shape.rows * shape.record();
    hidden.h0 = h0 ? offset_by(h0, d * shape.B * H, item_bytes(shape.dtype)) : nullptr;
    check_launch(launch_hidden_before(hidden, shape.dtype, call.on.stream()));
    // The hidden side of a parted gate has a slot of its own, the last.
    const int parted = cell_traits(shape.cell).parted_gate;
    const int64_t together = parted == kNone ? gates : parted * H;
    const Tensor& dw_hh = *dweights[2 * d + 1];
    multiply(transposed(matrix(dgates[d], shape.rows, together, slots, 1)), before, matrix(dw_hh, together, H));
    if (together < gates) {
      multiply(transposed(matrix(dgates[d], shape.rows, H, slots, 1, gates)), before,
               matrix(dw_hh, H, H, H, 1, together * H));
    }
  }
}

}  // namespace

namespace on_cuda {

TensorList sequence_backward(CellKind cell, const SequenceBackwardArguments& a) {
  SequenceCall call(cell, a.x, a.product_dtype);
  read_call(a, &call);
  check_sequence_gradients(a, call.dtypes, &call.on.device(), call.shape, call.shape.record());
  const LayerShape& shape = call.shape;
  const bool bias = call.weights[0].bias;
  const int64_t count = bias ? 4 : 2, slots = call.slots();
  take_arguments(a, !a.need_x, &call);
  const OptionalTensor h0 = call.operand_or_absent(a.h0), c0 = call.operand_or_absent(a.c0);
  const OptionalTensor dh_n = call.operand_or_absent(a.dh_n), dc_n = call.operand_or_absent(a.dc_n);
  const Tensor saved = contiguous_as(a.saved, aoti_torch_dtype_float32());
  Tensor dy, dcells;
  if (a.dy) dy = call.row_operand(a.dy);
  if (a.dcells) dcells = call.row_operand(a.dcells);

  TensorList grads;
  grads.reserve(a.weights.size() + 5);
  void *dh0, *dc0;
  add_input_gradients(a, call, &grads, &dh0, &dc0);
  add_weight_gradients(a, a.weights, call, &grads);
  const size_t record = grads.size();
  if (a.gate_grads) {
    grads.push_back(call.empty_gate_grads());
    grads.push_back(call.on.absent(aoti_torch_dtype_float32()));
  }
  if (shape.B == 0) return zero_gradients(a, std::move(grads));

  const SequencePlan plan = sequence_plan(shape, capped(gpu_limits(call.on.device().index)), true);
  const bool by_steps = plan.kind == SequencePlan::steps;
  SequenceBackward p = common_params<SequenceBackward>(call, h0, c0, plan);
  if (a.dy) p.dy = call.strided_rows<const void*>(dy);
  if (a.dcells) p.dcells = call.strided_rows<const void*>(dcells);
  p.saved = static_cast<const float*>(saved.data());
  p.dh_n = pointer(dh_n);
  p.dc_n = pointer(dc_n);
  p.bptt_steps = a.bptt_steps;
  Tensor dgates[2];
  for (int d = 0; d < shape.D; ++d) {
    dgates[d] = call.on.empty({shape.rows, slots}, call.dtype);
    p.dgates[d] = call.rows(dgates[d].data(), slots, shape.dtype);
  }
  if (a.gate_grads) p.gate_grads = static_cast<float*>(grads[record].data());
  p.dh0 = dh0;
  p.dc0 = dc0;
  const int segments = by_steps ? ceil_div(p.B, kSegmentRows) : plan.groups / shape.D;
  Tensor bias_sums;
  if (bias && a.need_weights) {
    bias_sums = call.on.floats({segments, shape.D, slots});
    p.bias_sums = static_cast<float*>(bias_sums.data());
  }
  if (!by_steps) {
    const GroupMemory memory(call, plan);
    memory.give(&p);
    check_launch(launch_sequence(p, shape.dtype, plan, call.on.stream()));
  } else {
    const Tensor hidden = call.on.empty({shape.D, shape.B, call.gates()}, call.dtype);
    const Tensor product = call.on.floats({shape.B, shape.H});
    const Tensor carry = call.on.floats({shape.D, shape.B, shape.H}), dc = call.on.floats({shape.D, shape.B, shape.H});
    copy_or_zero(carry, dh_n);
    copy_or_zero(dc, dc_n);
    zero(hidden);
    const BackwardSteps steps{call.host_sizes(), hidden.data(), static_cast<float*>(product.data()),
                              static_cast<float*>(carry.data()), static_cast<float*>(dc.data())};
    const auto multiply_by_weights = [&](int d) {
      const int64_t begin = d * shape.B * call.gates();
      multiply(matrix(hidden, shape.B, call.gates(), call.gates(), 1, begin), call.weights[d].w_hh, product);
      return 0;
    };
    check_launch(run_backward_steps(p, steps, shape.dtype, multiply_by_weights, call.on.stream()));
  }

  Tensor* dweights[4] = {};
  for (int d = 0; a.need_weights && d < shape.D; ++d) {
    dweights[2 * d] = &grads[static_cast<size_t>(3 + d * count)];
    dweights[2 * d + 1] = dweights[2 * d] + 1;
    if (!bias) continue;
    const BiasSums sums{cell,
                        p.H,
                        segments,
                        shape.D * slots,
                        p.bias_sums + d * slots,
                        dweights[2 * d][2].data(),
                        dweights[2 * d][3].data()};
    check_launch(launch_bias_sums(sums, call.dtypes.of(a.weights[0]), call.on.stream()));
  }
  products_of_gate_grads(call, dgates, saved, h0, a.need_x ? &grads[0] : nullptr, call.dtypes.of(a.x),
                         a.need_weights ? dweights : nullptr);
  return returned_gradients(a, std::move(grads));
}

}  // namespace on_cuda
}  // namespace dlk
