// Registers the implementations of the recurrent operators for one device.
#pragma once

#include <string>

#include "rnn/torch/ops.h"

namespace dlk {

template <auto forward, auto backward, auto step, auto step_backward>
struct RecurrentOperators {
  template <CellKind cell>
  static void implement_cell(torch::stable::detail::StableLibrary& library) {
    const std::string mode = mode_name(cell);
    library.impl(mode.c_str(), &BoxedCall<forward, cell>::kernel);
    library.impl((mode + "_backward").c_str(), &BoxedCall<backward, cell>::kernel);
    library.impl((mode + "_cell").c_str(), &BoxedCall<step, cell>::kernel);
    library.impl((mode + "_cell_backward").c_str(), &BoxedCall<step_backward, cell>::kernel);
  }
  static void implement(torch::stable::detail::StableLibrary& library) {
    implement_cell<CellKind::lstm>(library);
    implement_cell<CellKind::gru>(library);
    implement_cell<CellKind::rnn_tanh>(library);
    implement_cell<CellKind::rnn_relu>(library);
  }
};

}  // namespace dlk
