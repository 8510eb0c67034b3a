// The operators of layers with layer normalisation, zoneout and recurrent dropout on the CPU.
#include "rnn/torch/variants.h"

#include "rnn/torch/sequence_call.h"

namespace dlk::on_cpu {
namespace {

template <class Arguments>
Variant take_variant(const Arguments& a, Sequence* call) {
  Variant variant{};
  variant.normalised = !a.gains.empty();
  variant.eps = a.eps;
  variant.zoneout_c = a.zoneout_c;
  variant.zoneout_h = a.zoneout_h;
  const auto data = [&](const OptionalTensor& tensor) { return tensor ? call->inputs.contiguous(tensor) : nullptr; };
  variant.dropout = data(a.dropout);
  variant.mask_c = static_cast<const uint8_t*>(data(a.mask_c));
  variant.mask_h = static_cast<const uint8_t*>(data(a.mask_h));
  const GainList list = gain_list(call->shape, a.weights, a.gains);
  for (int d = 0; d < call->shape.D && variant.normalised; ++d) {
    const Tensor* of = &a.gains[static_cast<size_t>(d) * list.count];
    variant.gains[d] = gains_at<const void*>(list, call->dtypes.of(of[0]), of,
                                             [&](const Tensor& gain) { return call->inputs.contiguous(gain); });
  }
  return variant;
}

}  // namespace

VariantOutputs variant_forward(CellKind cell, const VariantForwardArguments& a) {
  Sequence call;
  read_call(cell, a, &call);
  check_variant(a, call.dtypes, nullptr, call.shape);
  const LayerShape& shape = call.shape;
  VariantForwardParams params{};
  ForwardParams& layer = params.layer;
  take_inputs(a, &call, &layer);
  params.variant = take_variant(a, &call);

  const bool lstm = cell_traits(cell).cell_state;
  const DType of_h = call.dtypes.result(a.h_dtype, "h_dtype"), of_c = call.dtypes.result(a.c_dtype, "c_dtype");
  Tensor y = call.empty_rows(shape.D * shape.H, of_h);
  Tensor h_n = new_state(true, shape.H, of_h, call, &layer.h_n);
  Tensor c_n = new_state(lstm, shape.H, lstm ? of_c : of_h, call, &layer.c_n);
  Tensor saved = call.empty_records(a.save, {variant_parts(shape, params.variant).size});
  if (shape.B > 0) {
    layer.y = call.output_rows(y);
    layer.saved = data_if(a.save, saved);
    dlk::variant_forward(params, current_runtime());
    remember_shape(shape);
  }
  return {std::move(y), std::move(h_n), std::move(c_n), std::move(saved)};
}

TensorList variant_backward(CellKind cell, const VariantBackwardArguments& a) {
  Sequence call;
  read_call(cell, a, &call);
  check_variant(a, call.dtypes, nullptr, call.shape);
  const LayerShape& shape = call.shape;
  VariantBackwardParams params{};
  params.variant = take_variant(a, &call);
  check_sequence_gradients(a, call.dtypes, nullptr, shape, variant_parts(shape, params.variant).size);
  BackwardParams& layer = params.layer;
  take_inputs(a, &call, &layer);
  take_cotangents(a, &call, &layer);

  TensorList grads;
  grads.reserve(3 + a.weights.size() + a.gains.size());
  add_input_gradients(a, call, &layer, &grads);
  for (const TensorList* list : {&a.weights, &a.gains})
    for (const Tensor& weight : *list) grads.push_back(a.need_weights ? empty_like(weight) : absent(weight.dtype()));
  if (a.need_weights) {
    take_weight_gradients(grads, a.weights.size(), shape.D, &layer);
    const GainList list = gain_list(shape, a.weights, a.gains);
    for (int d = 0; d < shape.D && list.count; ++d) {
      const Tensor* of = &grads[3 + a.weights.size() + static_cast<size_t>(d) * list.count];
      params.gains[d] =
          gains_at<void*>(list, params.variant.gains[d].dtype, of, [](const Tensor& grad) { return grad.data(); });
    }
  }
  if (shape.B > 0) {
    dlk::variant_backward(params, current_runtime());
    remember_shape(shape);
  } else {
    for (const Tensor& grad : grads) fill_with_zeros(grad);
  }
  return grads;
}

}  // namespace dlk::on_cpu
