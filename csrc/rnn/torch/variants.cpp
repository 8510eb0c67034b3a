// The operators of layers with layer normalisation, zoneout and recurrent dropout, and their schemas.
#include "rnn/torch/sequence_call.h"
#include "rnn/variants.h"

namespace dlk::on_cpu {
namespace {

// The gains of one direction.
struct GainList {
  size_t count;  // 0 without layer normalisation
  bool of_c, bias;
};

GainList gain_list(const LayerShape& shape, const TensorList& weights, const TensorList& gains) {
  const bool of_c = cell_traits(shape.cell).cell_state;
  const bool bias = of_c && weights.size() / static_cast<size_t>(shape.D) == 4;
  return {gains.empty() ? 0 : size_t{2} + of_c + bias, of_c, bias};
}

template <class Arguments>
void check_variant(const Arguments& a, const Sequence& call) {
  const LayerShape& shape = call.shape;
  DLK_CHECK(shape.P == 0, "weights: a layer with zoneout or recurrent dropout has no projection");
  const int64_t gates = gate_count(shape.cell) * shape.H;
  const GainList list = gain_list(shape, a.weights, a.gains);
  const size_t expected = list.count * static_cast<size_t>(shape.D);
  DLK_CHECK(a.gains.size() == expected, "gains must hold norm_ih, norm_hh", list.of_c ? ", norm_c" : "",
            list.bias ? ", bias_c" : "", " for each of ", shape.D, " directions, or nothing, got ", a.gains.size(),
            " tensors");
  for (size_t k = 0; k < a.gains.size(); ++k) {
    const size_t which = k % list.count;
    const char* const names[] = {"norm_ih", "norm_hh", "norm_c", "bias_c"};
    check_tensor(a.gains[k], names[which], torch_dtype(call.dtypes.of(a.gains[0])), {which < 2 ? gates : shape.H});
  }
  if (a.dropout)
    check_tensor(a.dropout, "dropout", torch_dtype(compute_type(shape.dtype)), {shape.D, shape.B, shape.H});
  const auto check_mask = [&](const OptionalTensor& mask, const char* what) {
    if (!mask) return;
    if (call.is_packed()) {
      check_tensor(mask, what, aoti_torch_dtype_bool(), {shape.D, shape.rows, shape.H});
    } else {
      check_tensor(mask, what, aoti_torch_dtype_bool(), {shape.D, shape.T, shape.B, shape.H});
    }
  };
  check_cell_state(shape.cell, a.mask_c, "mask_c");
  check_mask(a.mask_c, "mask_c");
  check_mask(a.mask_h, "mask_h");
  DLK_CHECK_VALUE(a.eps >= 0, "eps must not be negative, got ", a.eps);
  for (const double rate : {a.zoneout_c, a.zoneout_h})
    DLK_CHECK_VALUE(rate >= 0 && rate <= 1, "zoneout_c and zoneout_h must lie in 0..1, got ", rate);
}

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
    variant.gains[d] = {call->dtypes.of(of[0]), call->inputs.contiguous(of[0]), call->inputs.contiguous(of[1]),
                        list.of_c ? call->inputs.contiguous(of[2]) : nullptr,
                        list.bias ? call->inputs.contiguous(of[3]) : nullptr};
  }
  return variant;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> variant_forward(CellKind cell, const VariantForwardArguments& a) {
  Sequence call;
  read_call(cell, a, &call);
  check_variant(a, call);
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
  check_variant(a, call);
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
      const Tensor* g = &grads[3 + a.weights.size() + static_cast<size_t>(d) * list.count];
      params.gains[d] = {params.variant.gains[d].dtype, g[0].data(), g[1].data(), list.of_c ? g[2].data() : nullptr,
                         list.bias ? g[3].data() : nullptr};
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

}  // namespace
}  // namespace dlk::on_cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dlkernels, library) {
  for (dlk::CellKind cell : {dlk::CellKind::lstm, dlk::CellKind::gru}) {
    const std::string name = std::string(dlk::mode_name(cell)) + "_variant";
    library.def(
        (name + "(" + dlk::VariantForwardArguments::schema() + ") -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)")
            .c_str());
    library.def((name + "_backward(" + dlk::VariantBackwardArguments::schema() + ") -> Tensor[]").c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, library) {
  using dlk::CellKind;
  namespace device = dlk::on_cpu;
  library.impl("lstm_variant", dlk::boxed<device::variant_forward, CellKind::lstm>);
  library.impl("lstm_variant_backward", dlk::boxed<device::variant_backward, CellKind::lstm>);
  library.impl("gru_variant", dlk::boxed<device::variant_forward, CellKind::gru>);
  library.impl("gru_variant_backward", dlk::boxed<device::variant_backward, CellKind::gru>);
}
