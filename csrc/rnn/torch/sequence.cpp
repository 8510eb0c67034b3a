#include "core/isa.h"
#include "rnn/torch/sequence_call.h"

namespace dlk {
namespace {

// Packed weights of fewer bits also decide how the call runs: they set shape.weights.
const void* read_packed(const Tensor& packed, bool save, Isa isa, on_cpu::Sequence* call) {
  DLK_CHECK(packed.on_cpu() && packed.dtype() == aoti_torch_dtype_uint8() && packed.dim() == 1,
            "packed must be what the op `pack` returned: one-dimensional, uint8, on the CPU");
  const void* data = call->inputs.aligned(packed);
  call->shape.weights = rnn_packed_weights(data, packed.byte_count());
  DLK_CHECK(!save || call->shape.weights == Weights::given,
            "packed: weights of fewer bits are for calls without gradients, but save is True");
  DLK_CHECK(rnn_packed_matches(data, packed.byte_count(), call->shape, isa),
            "packed does not fit: it was packed for another cell, size, dtype or instruction set than this ",
            mode_name(call->shape.cell), " on ", isa_name(isa), "; pack the weights again");
  return data;
}

}  // namespace

namespace on_cpu {

SequenceOutputs sequence_forward(CellKind cell, const SequenceForwardArguments& a) {
  SequenceOutputs results = sequence_results(cell, a);
  auto& [y, h_n, c_n, saved, cells] = results;
  if (!c_n.get()) c_n = absent(y.dtype());
  if (!saved.get()) saved = absent(torch_dtype(compute_type(check_float(a.x, "x"))));
  if (!cells.get()) cells = absent(c_n.dtype());
  return results;
}

SequenceOutputs sequence_results(CellKind cell, const SequenceForwardArguments& a) {
  Sequence call;
  read_call(cell, a, &call);
  const LayerShape& shape = call.shape;
  const bool lstm = cell_traits(cell).cell_state;
  check_cells_exist(cell, a.cells);
  const Runtime runtime = current_runtime();

  ForwardParams params{};
  if (a.packed) params.packed = read_packed(a.packed, a.save, runtime.isa, &call);
  take_inputs(a, &call, &params);
  params.deterministic = a.deterministic;

  const DType of_h = call.dtypes.result(a.h_dtype, "h_dtype"), of_c = call.dtypes.result(a.c_dtype, "c_dtype");
  Tensor y = call.empty_rows(shape.D * shape.outputs(), of_h);
  Tensor h_n = new_state(true, shape.outputs(), of_h, call, &params.h_n);
  Tensor c_n, saved, cells;
  if (lstm) c_n = new_state(true, shape.H, of_c, call, &params.c_n);
  if (a.save) saved = call.empty_records(true, {shape.record()});
  if (a.cells) cells = call.empty_rows(shape.D * shape.H, of_c);
  if (shape.B > 0) {
    params.y = call.output_rows(y);
    if (a.cells) params.cells = call.output_rows(cells);
    if (a.save) params.saved = saved.data();
    rnn_forward(params, runtime);
    remember_shape(shape);
  }
  return {std::move(y), std::move(h_n), std::move(c_n), std::move(saved), std::move(cells)};
}

TensorList sequence_backward(CellKind cell, const SequenceBackwardArguments& a) {
  Sequence call;
  read_call(cell, a, &call);
  check_sequence_gradients(a, call.dtypes, nullptr, call.shape, call.shape.record());
  const LayerShape& shape = call.shape;

  BackwardParams params{};
  take_inputs(a, &call, &params);
  take_cotangents(a, &call, &params);
  params.deterministic = a.deterministic;

  TensorList grads;
  grads.reserve(a.weights.size() + 5);
  add_input_gradients(a, call, &params, &grads);
  for (const Tensor& weight : a.weights) grads.push_back(a.need_weights ? empty_like(weight) : absent(weight.dtype()));
  if (a.need_weights) take_weight_gradients(grads, a.weights.size(), shape.D, &params);
  if (a.gate_grads) {
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

}  // namespace on_cpu

Tensor pack_weights(const PackArguments& a) {
  DLK_CHECK(!a.weights.empty() && a.weights[0].dim() == 2, "weights must begin with w_ih of two dimensions");
  on_cpu::Sequence call;
  call.shape.cell = cell_from_mode(a.mode);
  call.shape.dtype = check_float(a.weights[0], "w_ih");
  call.shape.weights = weights_of_bits(a.bits);
  DLK_CHECK(call.shape.weights == Weights::given || call.shape.dtype == DType::f32,
            "weights must be float32 to be packed in ", a.bits, " bits");
  call.shape.D = a.bidirectional ? 2 : 1;
  call.dtypes = Dtypes(call.shape.dtype, -1);
  call.shape.I = a.weights[0].size(1);
  check_weights(a.weights, call.dtypes, nullptr, &call.shape);
  constexpr int64_t kMost = int64_t{1} << 17;  // sums of so many products of int8 fit into 32 bits
  DLK_CHECK(call.shape.weights != Weights::int8 || std::max(call.shape.I, call.shape.H) <= kMost,
            "weights: in 8 bits input_size and hidden_size may be up to ", kMost, ", got ", call.shape.I, " and ",
            call.shape.H);
  take_weights(a.weights, &call);
  const Isa isa = current_isa();
  const int64_t bytes = static_cast<int64_t>(rnn_packed_bytes(call.shape, isa));
  Tensor packed = empty({bytes}, aoti_torch_dtype_uint8());
  fill_with_zeros(packed);  // the kernels leave gaps between panels, and callers save the buffer
  rnn_pack(call.shape, call.weights, isa, packed.data());
  return packed;
}

}  // namespace dlk
