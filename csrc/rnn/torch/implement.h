// Registers the implementations of the recurrent operators for one device.
#pragma once

#include <string>

#include "rnn/torch/ops.h"

namespace dlk {

template <auto forward, auto backward, auto step, auto step_backward, auto variant, auto variant_backward>
struct RecurrentOperators {
  template <CellKind cell>
  static void implement_cell(torch::stable::detail::StableLibrary& library) {
    const std::string mode = mode_name(cell);
    library.impl(mode.c_str(), boxed<forward, cell>);
    library.impl((mode + "_backward").c_str(), boxed<backward, cell>);
    library.impl((mode + "_cell").c_str(), boxed<step, cell>);
    library.impl((mode + "_cell_backward").c_str(), boxed<step_backward, cell>);
  }
  template <CellKind cell>
  static void implement_variant(torch::stable::detail::StableLibrary& library) {
    const std::string name = std::string(mode_name(cell)) + "_variant";
    library.impl(name.c_str(), boxed<variant, cell>);
    library.impl((name + "_backward").c_str(), boxed<variant_backward, cell>);
  }
  static void implement(torch::stable::detail::StableLibrary& library) {
    implement_cell<CellKind::lstm>(library);
    implement_cell<CellKind::gru>(library);
    implement_cell<CellKind::rnn_tanh>(library);
    implement_cell<CellKind::rnn_relu>(library);
    implement_variant<CellKind::lstm>(library);
    implement_variant<CellKind::gru>(library);
  }
};

}  // namespace dlk
