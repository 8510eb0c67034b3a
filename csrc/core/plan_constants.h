// The numbers by which plans choose, for each instruction set (core/plan_constants.def).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/types.h"

namespace dlk {

struct PlanConstants {
#define DLK_CONSTANT(name, ...) int64_t name;
#include "core/plan_constants.def"
#undef DLK_CONSTANT
};

const PlanConstants& plan_constants(Isa isa);

using NamedNumbers = std::vector<std::pair<std::string, int64_t>>;

NamedNumbers named_plan_constants(Isa isa);

// Makes the plans of `isa` use these numbers and otherwise those of the table; with none, the table's alone. For tests
// and measurements, while no other thread runs a layer or attention. Throws std::invalid_argument for a name that the
// table lacks or a number below 1.
void override_plan_constants(Isa isa, const NamedNumbers& numbers);

}  // namespace dlk
