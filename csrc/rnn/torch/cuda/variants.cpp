// The operators of layers with layer normalisation, zoneout and recurrent dropout on CUDA tensors: torch's products
// before and after the recurrence, and at each step one product and one kernel (rnn/cuda/variant_steps.h).
#include "rnn/torch/variants.h"

#include "rnn/cuda/variant_steps.h"
#include "rnn/torch/cuda/gradient_products.h"
#include "rnn/torch/ops.h"

namespace dlk {
namespace {

const float* floats_of(const Tensor& tensor) { return tensor.get() ? static_cast<float*>(tensor.data()) : nullptr; }

// The arguments that plain layers do not have, in the form that the kernels read. Biases and gains are read in float32.
struct VariantTensors {
  template <class Arguments>
  VariantTensors(const Arguments& a, const SequenceCall& call) {
    const LayerShape& shape = call.shape;
    const int32_t f32 = aoti_torch_dtype_float32();
    const size_t count = a.weights.size() / static_cast<size_t>(shape.D);
    const GainList list = gain_list(shape, a.weights, a.gains);
    layer.cell = shape.cell;
    layer.T = static_cast<int>(shape.T), layer.B = static_cast<int>(shape.B), layer.H = static_cast<int>(shape.H);
    layer.D = shape.D;
    layer.rows = shape.rows;
    layer.batch_sizes = call.host_sizes();
    if (call.is_packed() && shape.B > 0) layer.offsets = static_cast<const int*>(call.offsets.data());
    if (call.has_lengths) layer.lengths = static_cast<const int64_t*>(call.lengths.data());
    if (a.dropout) dropout = contiguous_as(a.dropout, f32);
    for (int d = 0; d < shape.D; ++d) {
      StepVariant& variant = layer.variants[d];
      variant.normalised = list.count > 0;
      variant.eps = static_cast<float>(a.eps);
      variant.zoneout_c = static_cast<float>(a.zoneout_c);
      variant.zoneout_h = static_cast<float>(a.zoneout_h);
      if (a.dropout) variant.dropout = floats_of(dropout) + d * shape.B * shape.H;
      for (size_t k = 2; k < count; ++k)
        biases[d][k - 2] = contiguous_as(a.weights[static_cast<size_t>(d) * count + k], f32);
      for (size_t k = 0; k < list.count; ++k)
        gains[d][k] = contiguous_as(a.gains[static_cast<size_t>(d) * list.count + k], f32);
      variant.b_ih = floats_of(biases[d][0]);
      variant.b_hh = floats_of(biases[d][1]);
      variant.gains = gains_at<const float*>(list, DType::f32, gains[d], floats_of);
    }
    if (a.mask_c) mask_c = contiguous_as(a.mask_c, aoti_torch_dtype_bool());
    if (a.mask_h) mask_h = contiguous_as(a.mask_h, aoti_torch_dtype_bool());
    if (a.mask_c) layer.mask_c = static_cast<const uint8_t*>(mask_c.data());
    if (a.mask_h) layer.mask_h = static_cast<const uint8_t*>(mask_h.data());
  }

  VariantLayer layer{};
  Tensor biases[2][2], gains[2][4], dropout, mask_c, mask_h;
};

template <class Arguments>
void read_variant(const Arguments& a, SequenceCall* call) {
  read_call(a, call);
  check_variant(a, call->dtypes, &call->on.device(), call->shape);
}

// A new [D, B, H] of float32 with the values of a state; absent = zeros.
Tensor float_state(const SequenceCall& call, const OptionalTensor& state) {
  const LayerShape& shape = call.shape;
  Tensor made = call.on.floats({shape.D, shape.B, shape.H});
  copy_or_zero(made, state);
  return made;
}

// Direction d of a tensor [D, B, features].
Tensor of_direction(const Tensor& states, int d, int64_t features) {
  const int64_t B = states.size(1);
  return matrix(states, B, features, features, 1, d * B * features);
}

}  // namespace

namespace on_cuda {

VariantOutputs variant_forward(CellKind cell, const VariantForwardArguments& a) {
  SequenceCall call(cell, a.x, a.product_dtype);
  read_variant(a, &call);
  const int32_t of_h = call.result_dtype(a.h_dtype, "h_dtype"), of_c = call.result_dtype(a.c_dtype, "c_dtype");
  take_arguments(a, true, &call);
  const VariantTensors own(a, call);
  const OptionalTensor h0 = call.operand_or_absent(a.h0), c0 = call.operand_or_absent(a.c0);
  const LayerShape& shape = call.shape;
  const int64_t H = shape.H, record = variant_record(cell, H, !a.gains.empty());
  const bool lstm = call.lstm();

  Tensor y = call.empty_rows(shape.D * H);
  Tensor h_n = call.on.empty({shape.D, shape.B, H}, call.dtype);
  Tensor c_n = lstm ? call.on.empty({shape.D, shape.B, H}, call.dtype) : call.on.absent(of_h);
  Tensor saved = a.save ? call.empty_records(record) : call.on.absent(aoti_torch_dtype_float32());
  if (shape.B > 0) {
    VariantForwardSteps p{};
    p.layer = own.layer;
    const Tensor inputs = matrix(call.x, shape.rows, shape.I);
    Tensor gates[2], operand;
    for (int d = 0; d < shape.D; ++d) {
      gates[d] = call.on.floats({shape.rows, call.gates()});
      multiply(inputs, transposed(call.weights[d].w_ih), gates[d]);
      p.gates[d] = call.rows(static_cast<const float*>(gates[d].data()), call.gates(), DType::f32);
    }
    const Tensor gates_h = call.on.floats({shape.B, call.gates()});
    const Tensor h = float_state(call, h0);
    Tensor c;
    copy_or_zero(h_n, h0);
    if (lstm) {
      c = float_state(call, c0);
      copy_or_zero(c_n, c0);
      p.c = static_cast<float*>(c.data());
      p.c_n = c_n.data();
    }
    if (a.dropout) {
      // Before the first step of each sequence, as if there were no other.
      operand = call.on.empty({shape.D, shape.B, H}, call.dtype);
      for (int d = 0; d < shape.D; ++d) {
        HiddenBefore first{};
        first.cell = cell;
        first.T = 1, first.B = own.layer.B, first.H = own.layer.H;
        first.h0 = h0 ? offset_by(h0, d * shape.B * H, item_bytes(shape.dtype)) : nullptr;
        first.to = {offset_by(operand, d * shape.B * H, item_bytes(shape.dtype)), shape.B * H, H, shape.dtype};
        first.dropout = own.layer.variants[d].dropout;
        check_launch(launch_hidden_before(first, shape.dtype, call.on.stream()));
      }
      p.operand = operand.data();
    }
    p.gates_h = static_cast<float*>(gates_h.data());
    p.h = static_cast<float*>(h.data());
    p.h_n = h_n.data();
    p.y = call.strided_rows<void*>(y);
    if (a.save) p.saved = static_cast<float*>(saved.data());
    const auto product = [&](int d) {
      multiply(of_direction(a.dropout ? operand : h_n, d, H), transposed(call.weights[d].w_hh), gates_h);
      return 0;
    };
    check_launch(run_variant_forward(p, shape.dtype, product, call.on.stream()));
  }
  return {returned_as(std::move(y), of_h), returned_as(std::move(h_n), of_h),
          returned_as(std::move(c_n), lstm ? of_c : of_h), std::move(saved)};
}

TensorList variant_backward(CellKind cell, const VariantBackwardArguments& a) {
  SequenceCall call(cell, a.x, a.product_dtype);
  read_variant(a, &call);
  const LayerShape& shape = call.shape;
  const bool lstm = call.lstm(), normalised = !a.gains.empty();
  const int64_t H = shape.H, gates = call.gates(), record = variant_record(cell, H, normalised);
  check_sequence_gradients(a, call.dtypes, &call.on.device(), shape, record);
  take_arguments(a, !a.need_x, &call);
  const VariantTensors own(a, call);
  const OptionalTensor h0 = call.operand_or_absent(a.h0), c0 = call.operand_or_absent(a.c0);
  const Tensor saved = contiguous_as(a.saved, aoti_torch_dtype_float32());
  Tensor dy;
  if (a.dy) dy = call.row_operand(a.dy);

  TensorList grads;
  grads.reserve(3 + a.weights.size() + a.gains.size());
  VariantBackwardSteps p{};
  add_input_gradients(a, call, &grads, &p.dh0, &p.dc0);
  add_weight_gradients(a, a.weights, call, &grads);
  add_weight_gradients(a, a.gains, call, &grads);
  if (shape.B == 0) return zero_gradients(a, std::move(grads));

  p.layer = own.layer;
  p.bptt_steps = a.bptt_steps;
  p.saved = static_cast<const float*>(saved.data());
  p.h0 = pointer(h0);
  p.c0 = pointer(c0);
  if (a.dy) p.dy = call.strided_rows<const void*>(dy);
  const Tensor hidden = call.on.empty({shape.D, shape.B, gates}, call.dtype);
  const Tensor product = call.on.floats({shape.B, H});
  const Tensor dh = float_state(call, a.dh_n);
  Tensor dc;
  if (lstm) {
    dc = float_state(call, a.dc_n);
    p.dc = static_cast<float*>(dc.data());
  }
  p.hidden = hidden.data();
  p.product = static_cast<float*>(product.data());
  p.dh = static_cast<float*>(dh.data());
  // The lstm's gates have the same gradient on both sides, and without layer normalisation so have the products.
  const bool one_side = lstm && !normalised;
  const int64_t values = variant_grads(cell) * H;
  Tensor row_grads[2], of_input[2], of_hidden[2];
  for (int d = 0; d < shape.D; ++d) {
    row_grads[d] = call.on.floats({shape.rows, values});
    p.grads[d] = static_cast<float*>(row_grads[d].data());
    of_input[d] = call.on.empty({shape.rows, gates}, call.dtype);
    p.of_input[d] = call.rows(of_input[d].data(), gates, shape.dtype);
    if (one_side) continue;
    of_hidden[d] = call.on.empty({shape.rows, gates}, call.dtype);
    p.of_hidden[d] = call.rows(of_hidden[d].data(), gates, shape.dtype);
  }
  const auto multiply_by_weights = [&](int d) {
    multiply(of_direction(hidden, d, gates), call.weights[d].w_hh, product);
    return 0;
  };
  check_launch(run_variant_backward(p, shape.dtype, multiply_by_weights, call.on.stream()));

  if (a.need_x) input_gradient(call, of_input, grads[0], call.dtypes.of(a.x));
  if (!a.need_weights) return returned_gradients(a, std::move(grads));
  const Tensor inputs = alive_inputs(call), before = call.on.empty({shape.rows, H}, call.dtype);
  const Tensor partial = call.on.floats({variant_segments(shape.rows), kVariantSums, values});
  const size_t count = a.weights.size() / static_cast<size_t>(shape.D);
  const GainList list = gain_list(shape, a.weights, a.gains);
  for (int d = 0; d < shape.D; ++d) {
    const Tensor* dw = &grads[3 + static_cast<size_t>(d) * count];
    multiply(transposed(of_input[d]), inputs, dw[0]);
    HiddenBefore place = variant_hidden(own.layer, d, p.saved, p.h0, shape.dtype);
    place.to = call.rows(before.data(), H, shape.dtype);
    check_launch(launch_hidden_before(place, shape.dtype, call.on.stream()));
    multiply(transposed(one_side ? of_input[d] : of_hidden[d]), before, dw[1]);
    if (count < 4 && !normalised) continue;
    VariantSums sums{cell,
                     own.layer.T,
                     own.layer.B,
                     own.layer.H,
                     shape.rows,
                     normalised,
                     own.layer.lengths,
                     p.grads[d],
                     p.saved + d * shape.rows * record,
                     static_cast<float*>(partial.data()),
                     call.dtypes.of(a.weights[0]),
                     count < 4 ? nullptr : dw[2].data(),
                     count < 4 ? nullptr : dw[3].data(),
                     {}};
    if (normalised) {
      const Tensor* of = &grads[3 + a.weights.size() + static_cast<size_t>(d) * list.count];
      sums.gains =
          gains_at<void*>(list, call.dtypes.of(a.gains[0]), of, [](const Tensor& grad) { return grad.data(); });
    }
    check_launch(launch_variant_sums(sums, call.on.stream()));
  }
  return returned_gradients(a, std::move(grads));
}

}  // namespace on_cuda
}  // namespace dlk
