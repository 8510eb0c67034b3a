// How the cells differ: the only source of these facts for the kernels, plans and torch boundaries of every device.
// dlkernels/rnn/kinds.py repeats them for Python; tests/rnn/test_kinds.py compares the two.
#pragma once

namespace dlk {

enum class CellKind : int { lstm, gru, rnn_tanh, rnn_relu };
constexpr CellKind kCellKinds[] = {CellKind::lstm, CellKind::gru, CellKind::rnn_tanh, CellKind::rnn_relu};

constexpr int kNone = -1;

struct CellTraits {
  const char* mode;  // the name of its operators
  int gates;         // blocks of H rows in W_ih and W_hh
  int saved;         // slots of H values in what the forward saves of a row. The last one is the state after the step:
                     // c' where there is a cell state, else h'
  int bounded;       // how many slots at the start are within [-1, 1]: in a call of a 16-bit dtype they are fixed16
  int narrow;        // how many slots at the end have that dtype then: h', which y rounds too, and gru's W_hn h + b_hn
  bool state_follows;  // whether the backward of a step needs no state slot if it has the state before the step
  int parted_gate;   // the last gate, if its two products stay separate, each with its own bias and gradient; or kNone
  bool cell_state;   // whether there is a c beside h
  bool direct_path;  // whether h' depends on h directly, not only through the gates
  bool projection;   // whether h may be projected
};

constexpr CellTraits cell_traits(CellKind cell) {
  switch (cell) {
    case CellKind::lstm:
      return {"lstm", 4, 5, 4, 0, true, kNone, true, false, true};
    case CellKind::gru:
      return {"gru", 3, 5, 3, 2, true, 2, false, true, false};
    case CellKind::rnn_tanh:
      return {"rnn_tanh", 1, 1, 0, 1, false, kNone, false, false, false};
    case CellKind::rnn_relu:
      return {"rnn_relu", 1, 1, 0, 1, false, kNone, false, false, false};
  }
  return {};
}

constexpr const char* mode_name(CellKind cell) { return cell_traits(cell).mode; }
constexpr int gate_count(CellKind cell) { return cell_traits(cell).gates; }
constexpr int saved_slots(CellKind cell) { return cell_traits(cell).saved; }
// Gate gradients per unit: those of the input side, then that of the parted gate's hidden side.
constexpr int gate_grad_slots(CellKind cell) { return gate_count(cell) + (cell_traits(cell).parted_gate != kNone); }

// The same facts as compile-time constants, from which the cells derive.
template <CellKind cell>
struct CellConstants {
  static constexpr CellTraits kTraits = cell_traits(cell);
  static constexpr int kGates = kTraits.gates, kSaved = kTraits.saved;
  static constexpr int kBounded = kTraits.bounded, kNarrow = kTraits.narrow;
  static constexpr int kGateGrads = gate_grad_slots(cell), kStateSlot = kSaved - 1, kPartedGate = kTraits.parted_gate;
  static constexpr bool kHasPartedGate = kPartedGate != kNone;
  static_assert(!kHasPartedGate || kPartedGate == kGates - 1, "products take the gates before it together");
  static constexpr bool kCellState = kTraits.cell_state, kDirectPath = kTraits.direct_path;
};

}  // namespace dlk
