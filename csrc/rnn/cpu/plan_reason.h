// A plan in words, for explain().
#pragma once

#include <string>

#include "rnn/params.h"

namespace dlk {

const char* split_name(Plan::Split split);  // "serial", "rows", "units"
std::string plan_reason(const Plan& plan, const LayerShape& shape);

}  // namespace dlk
