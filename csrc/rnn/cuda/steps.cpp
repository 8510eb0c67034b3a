#include "steps.h"

#include "rows.h"
#include "step_places.h"

namespace dlk {
namespace {

// Whether a step takes a state in float32 from the one before: c of the lstm, h of the gru.
bool has_state(CellKind cell) { return cell_traits(cell).cell_state || cell_traits(cell).direct_path; }

}  // namespace

int run_forward_steps(const SequenceForward& p, const ForwardSteps& steps, DType dtype, const StepProduct& multiply,
                      void* stream) {
  const int64_t H = p.H, states = static_cast<int64_t>(p.B) * H, gates = gate_count(p.cell) * H;
  const int64_t slots = saved_slots(p.cell) * H;
  const int size = dtype == DType::f32 ? 4 : 2;
  const bool f32 = dtype == DType::f32, lstm = cell_traits(p.cell).cell_state;
  const StepPlaces places(steps.batch_sizes, p.T, p.B);
  if (p.resets) {
    // A reset of a sequence's first step, which only the first direction can have. Those of later steps are left to
    // the cell kernel of the step before.
    const InitialResets first{
        p.B, p.H, {0, p.T, p.offsets, p.lengths, false, p.resets}, p.h_n, has_state(p.cell) ? steps.state : nullptr};
    if (const int error = launch_initial_resets(first, dtype, stream)) return error;
  }
  for (int s = 0; s < p.T; ++s) {
    for (int d = 0; d < p.D; ++d) {
      const int t = d == 0 ? s : p.T - 1 - s;
      if (const int error = multiply(d)) return error;
      CellForward cell{};
      cell.cell = p.cell;
      cell.B = p.B;
      cell.H = p.H;
      cell.rows = {t, p.T, p.offsets, p.lengths, d == 1, p.resets};
      cell.gates_x = places.rows<const float*>(p.gates[d], t, 0, 4, true);
      cell.gates_h = {steps.gates_h, gates, true};
      cell.b_ih = p.b_ih[d];
      cell.b_hh = p.b_hh[d];
      if (has_state(p.cell)) {
        cell.state = {steps.state + d * states, H, true};
        cell.new_state = {steps.state + d * states, H, true};
      }
      cell.h = {at(p.h_n, d * states * size), H, f32};
      cell.y = places.rows<void*>(p.y, t, d * H, size, f32);
      if (lstm) {
        cell.c_n = {at(p.c_n, d * states * size), H, f32};
        cell.cells = places.rows<void*>(RowTensor<void*>{p.cells, p.y.t, p.y.b, p.y.dtype}, t, d * H, size, f32);
      }
      if (p.saved) cell.saved = places.records(p.saved + d * p.saved_rows * slots, t, slots);
      if (const int error = launch_cell(cell, dtype, stream)) return error;
    }
  }
  return 0;
}

int run_backward_steps(const SequenceBackward& p, const BackwardSteps& steps, DType dtype, const StepProduct& multiply,
                       void* stream) {
  const int64_t H = p.H, states = static_cast<int64_t>(p.B) * H, gates = gate_count(p.cell) * H;
  const int64_t saved = saved_slots(p.cell) * H, slots = gate_grad_slots(p.cell) * H;
  const int size = dtype == DType::f32 ? 4 : 2;
  const bool f32 = dtype == DType::f32, lstm = cell_traits(p.cell).cell_state;
  const StepPlaces places(steps.batch_sizes, p.T, p.B);
  for (int s = 0; s < p.T; ++s) {
    for (int d = 0; d < p.D; ++d) {
      const int t = d == 0 ? p.T - 1 - s : s, before = d == 0 ? t - 1 : t + 1;
      if (s > 0) {
        if (const int error = multiply(d)) return error;
      }
      CellBackward cell{};
      cell.cell = p.cell;
      cell.B = p.B;
      cell.H = p.H;
      cell.rows = {t, p.T, p.offsets, p.lengths, d == 1, p.resets};
      cell.bptt_steps = p.bptt_steps;
      const float* records = p.saved + d * p.saved_rows * saved;
      cell.saved = places.records(records, t, saved);
      if (has_state(p.cell)) {
        const StateRows<const float*> state = places.records(records + (saved - H), before, saved);
        cell.state = {state.data, state.stride, true};
        cell.first = {at(lstm ? p.c0 : p.h0, d * states * size), H, f32};
      }
      cell.dy = places.rows<const void*>(p.dy, t, d * H, size, f32);
      cell.dcells = places.rows<const void*>(p.dcells, t, d * H, size, f32);
      if (s > 0) cell.product = {steps.product, H, true};
      cell.carry = {steps.carry + d * states, H, true};
      if (lstm) {
        cell.dc = {steps.dc + d * states, H, true};
        cell.new_dc = {steps.dc + d * states, H, true};
      }
      cell.dgates = places.rows<void*>(p.dgates[d], t, 0, size, f32);
      if (p.gate_grads) cell.gate_grads = places.records(p.gate_grads + d * p.saved_rows * slots, t, slots);
      cell.hidden = {at(steps.hidden, d * static_cast<int64_t>(p.B) * gates * size), gates, f32};
      if (p.bias_sums) {
        cell.bias_sums = p.bias_sums + d * slots;
        cell.segment_stride = p.D * slots;
        cell.add_to_bias_sums = s > 0;
      }
      if (const int error = launch_cell(cell, dtype, stream)) return error;
    }
  }
  for (int d = 0; d < p.D; ++d) {
    if (p.dh0) {
      if (const int error = multiply(d)) return error;
      const AddStates dh0{states, steps.carry + d * states, steps.product, at(p.dh0, d * states * size)};
      if (const int error = launch_add_states(dh0, dtype, stream)) return error;
    }
    if (p.dc0 && lstm) {
      const AddStates dc0{states, steps.dc + d * states, nullptr, at(p.dc0, d * states * size)};
      if (const int error = launch_add_states(dc0, dtype, stream)) return error;
    }
  }
  return 0;
}

}  // namespace dlk
