// The schemas of the recurrent operators, and their implementations for the CPU.
#include "rnn/torch/implement.h"

STABLE_TORCH_LIBRARY(dlkernels, library) {
  for (dlk::CellKind cell : dlk::kCellKinds) {
    const std::string mode = dlk::mode_name(cell);
    const auto define = [&](const char* suffix, const std::string& arguments, const char* results) {
      library.def((mode + suffix + "(" + arguments + ") -> " + results).c_str());
    };
    define("", dlk::SequenceForwardArguments::schema(),
           "(Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor cells)");
    define("_backward", dlk::SequenceBackwardArguments::schema(), "Tensor[]");
    define("_cell", dlk::CellForwardArguments::schema(), "Tensor[]");
    define("_cell_backward", dlk::CellBackwardArguments::schema(), "Tensor[]");
  }
  for (dlk::CellKind cell : {dlk::CellKind::lstm, dlk::CellKind::gru}) {
    const std::string name = std::string(dlk::mode_name(cell)) + "_variant";
    library.def(
        (name + "(" + dlk::VariantForwardArguments::schema() + ") -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)")
            .c_str());
    library.def((name + "_backward(" + dlk::VariantBackwardArguments::schema() + ") -> Tensor[]").c_str());
  }
  library.def(("pack(" + dlk::PackArguments::schema() + ") -> Tensor").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, library) {
  namespace device = dlk::on_cpu;
  dlk::RecurrentOperators<device::sequence_forward, device::sequence_backward, device::cell_forward,
                          device::cell_backward, device::variant_forward, device::variant_backward>::implement(library);
  library.impl("pack", dlk::boxed<dlk::pack_weights>);
}
