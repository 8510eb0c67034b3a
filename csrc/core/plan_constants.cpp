#include "plan_constants.h"

#include <iterator>
#include <stdexcept>

namespace dlk {
namespace {

#define DLK_CONSTANT(name, ...)                 \
  constexpr int64_t k_##name[] = {__VA_ARGS__}; \
  static_assert(std::size(k_##name) == kIsaCount, #name " needs a number for each row of core/isas.def");
#include "core/plan_constants.def"
#undef DLK_CONSTANT

constexpr PlanConstants of_table(size_t isa) {
  return {
#define DLK_CONSTANT(name, ...) k_##name[isa],
#include "core/plan_constants.def"
#undef DLK_CONSTANT
  };
}

PlanConstants g_constants[] = {
#define DLK_ISA_ROW(name, features, vectors, bf16) of_table(static_cast<size_t>(Isa::name)),
#include "core/isas.def"
#undef DLK_ISA_ROW
};

struct Field {
  const char* name;
  int64_t PlanConstants::* number;
};

constexpr Field kFields[] = {
#define DLK_CONSTANT(name, ...) {#name, &PlanConstants::name},
#include "core/plan_constants.def"
#undef DLK_CONSTANT
};

const Field& field(const std::string& name) {
  for (const Field& known : kFields) {
    if (name == known.name) return known;
  }
  throw std::invalid_argument("unknown constant '" + name + "': core/plan_constants.def lists them");
}

}  // namespace

const PlanConstants& plan_constants(Isa isa) { return g_constants[static_cast<size_t>(isa)]; }

NamedNumbers named_plan_constants(Isa isa) {
  NamedNumbers numbers;
  for (const Field& known : kFields) numbers.emplace_back(known.name, plan_constants(isa).*known.number);
  return numbers;
}

void override_plan_constants(Isa isa, const NamedNumbers& numbers) {
  PlanConstants constants = of_table(static_cast<size_t>(isa));
  for (const auto& [name, number] : numbers) {
    if (number < 1) throw std::invalid_argument(name + ": expected at least 1, got " + std::to_string(number));
    constants.*field(name).number = number;
  }
  g_constants[static_cast<size_t>(isa)] = constants;
}

}  // namespace dlk
