#include "variant_steps.h"

#include "step_places.h"

namespace dlk {
namespace {

int item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The masks of a step.
const uint8_t* mask_of(const uint8_t* masks, const VariantLayer& layer, int64_t first_row, int d) {
  return masks ? masks + (d * layer.rows + first_row) * layer.H : nullptr;
}

int64_t record_of(const VariantLayer& layer) {
  return variant_record(layer.cell, layer.H, layer.variants[0].normalised);
}

}  // namespace

int run_variant_forward(const VariantForwardSteps& p, DType dtype, const StepProduct& multiply, void* stream) {
  const VariantLayer& layer = p.layer;
  const int64_t H = layer.H, states = layer.B * H, record = record_of(layer);
  const int size = item_size(dtype);
  const bool f32 = dtype == DType::f32, lstm = cell_traits(layer.cell).cell_state;
  const StepPlaces places(layer.batch_sizes, layer.T, layer.B);
  for (int s = 0; s < layer.T; ++s) {
    for (int d = 0; d < layer.D; ++d) {
      const int t = d == 0 ? s : layer.T - 1 - s;
      if (const int error = multiply(d)) return error;
      VariantCellForward cell{};
      cell.cell = layer.cell;
      cell.B = layer.B;
      cell.H = layer.H;
      cell.rows = {t, layer.T, layer.offsets, layer.lengths, d == 1, nullptr};
      cell.variant = layer.variants[d];
      cell.mask_c = mask_of(layer.mask_c, layer, places.row(t), d);
      cell.mask_h = mask_of(layer.mask_h, layer, places.row(t), d);
      cell.gates_x = places.rows<const float*>(p.gates[d], t, 0, 4, true);
      cell.gates_h = p.gates_h;
      cell.h = p.h + d * states;
      cell.h_n = at(p.h_n, d * states * size);
      if (lstm) {
        cell.c = p.c + d * states;
        cell.c_n = at(p.c_n, d * states * size);
      }
      cell.operand = at(p.operand, d * states * size);
      cell.y = places.rows<void*>(p.y, t, d * H, size, f32);
      if (p.saved) cell.saved = places.records(p.saved + d * layer.rows * record, t, record);
      if (const int error = launch_variant_cell(cell, dtype, stream)) return error;
    }
  }
  return 0;
}

int run_variant_backward(const VariantBackwardSteps& p, DType dtype, const StepProduct& multiply, void* stream) {
  const VariantLayer& layer = p.layer;
  const int64_t H = layer.H, states = layer.B * H, gates = gate_count(layer.cell) * H, record = record_of(layer);
  const int64_t grads = variant_grads(layer.cell) * H;
  const int size = item_size(dtype);
  const bool f32 = dtype == DType::f32, lstm = cell_traits(layer.cell).cell_state;
  const StepPlaces places(layer.batch_sizes, layer.T, layer.B);
  for (int s = 0; s < layer.T; ++s) {
    for (int d = 0; d < layer.D; ++d) {
      const int t = d == 0 ? layer.T - 1 - s : s, before = d == 0 ? t - 1 : t + 1;
      if (s > 0) {
        if (const int error = multiply(d)) return error;
      }
      VariantCellBackward cell{};
      cell.cell = layer.cell;
      cell.B = layer.B;
      cell.H = layer.H;
      cell.rows = {t, layer.T, layer.offsets, layer.lengths, d == 1, nullptr};
      cell.variant = layer.variants[d];
      cell.bptt_steps = p.bptt_steps;
      cell.mask_c = mask_of(layer.mask_c, layer, places.row(t), d);
      cell.mask_h = mask_of(layer.mask_h, layer, places.row(t), d);
      const float* records = p.saved + d * layer.rows * record;
      cell.saved = places.records(records, t, record);
      cell.before = places.records(records, before, record);
      cell.h0 = at(p.h0, d * states * size);
      if (lstm) cell.c0 = at(p.c0, d * states * size);
      cell.dy = places.rows<const void*>(p.dy, t, d * H, size, f32);
      if (s > 0) cell.product = p.product;
      cell.dh = p.dh + d * states;
      if (lstm) cell.dc = p.dc + d * states;
      cell.grads = places.records(p.grads[d], t, grads);
      cell.of_input = places.rows<void*>(p.of_input[d], t, 0, size, f32);
      cell.of_hidden = places.rows<void*>(p.of_hidden[d], t, 0, size, f32);
      cell.hidden = at(p.hidden, d * layer.B * gates * size);
      if (const int error = launch_variant_cell(cell, dtype, stream)) return error;
    }
  }
  for (int d = 0; d < layer.D; ++d) {
    if (p.dh0) {
      if (const int error = multiply(d)) return error;
      const AddStates dh0{states, p.dh + d * states, p.product, at(p.dh0, d * states * size),
                          layer.variants[d].dropout};
      if (const int error = launch_add_states(dh0, dtype, stream)) return error;
    }
    if (p.dc0 && lstm) {
      const AddStates dc0{states, p.dc + d * states, nullptr, at(p.dc0, d * states * size)};
      if (const int error = launch_add_states(dc0, dtype, stream)) return error;
    }
  }
  return 0;
}

HiddenBefore variant_hidden(const VariantLayer& layer, int d, const float* saved, const void* h0, DType dtype) {
  HiddenBefore hidden{};
  hidden.cell = layer.cell;
  hidden.T = layer.T, hidden.B = layer.B, hidden.H = layer.H;
  hidden.offsets = layer.offsets;
  hidden.lengths = layer.lengths;
  hidden.reverse = d == 1;
  hidden.record = record_of(layer);
  hidden.saved = saved + d * layer.rows * hidden.record;
  hidden.h0 = at(h0, int64_t{d} * layer.B * layer.H * item_size(dtype));
  hidden.h = cell_traits(layer.cell).cell_state ? VariantRecord<CellConstants<CellKind::lstm>>::kH
                                                : VariantRecord<CellConstants<CellKind::gru>>::kH;
  hidden.h *= layer.H;
  hidden.dropout = layer.variants[d].dropout;
  return hidden;
}

}  // namespace dlk
