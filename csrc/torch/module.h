// The parts of the host module `_C`.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/types.h"

namespace dlk {

DType dtype_from_name(std::string name);  // "float32" or "torch.float32", ...
void bind_attention(pybind11::module_& m);
void bind_direct_calls(pybind11::module_& m);  // rnn/torch/direct.cpp

}  // namespace dlk
