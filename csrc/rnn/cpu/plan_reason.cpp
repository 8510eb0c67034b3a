#include "plan_reason.h"

#include "core/isa.h"

namespace dlk {
namespace {

std::string count(int64_t n, const char* thing) { return std::to_string(n) + " " + thing + (n == 1 ? "" : "s"); }

std::string recurrence_reason(const Plan& plan, const LayerShape& shape) {
  const std::string size = std::to_string(gate_count(shape.cell) * shape.H) + "x" + std::to_string(shape.outputs());
  if (plan.recurrence == Plan::dot) {
    return "the " + size + " recurrent weights are used unpacked, one dot product per gate row: for " +
           count(shape.B, "sequence") + " packing them would cost more than it saves";
  }
  return "the " + size + " recurrent weights are packed and multiplied in register tiles, which " +
         count(shape.B, "sequence") + (shape.B == 1 ? " shares" : " share");
}

std::string split_reason(const Plan& plan, const LayerShape& shape) {
  if (plan.threads == 1) return "one thread does everything";
  const std::string members = count(plan.threads, "thread");
  if (plan.directions_side_by_side && plan.threads == 2) return members + " take a direction each";
  switch (plan.split) {
    case Plan::rows:
      return members + " take their own sequences of the batch through the recurrence";
    case Plan::units:
      return members + " share the " + std::to_string(shape.H) + " hidden units" +
             (shape.T > 1 ? ", each with its slice of the weights in its own cache, and wait for each other once a step"
                          : "");
    case Plan::serial:
      break;
  }
  return "one direction per thread";
}

}  // namespace

const char* split_name(Plan::Split split) {
  return split == Plan::serial ? "serial" : split == Plan::rows ? "rows" : "units";
}

std::string plan_reason(const Plan& plan, const LayerShape& shape) {
  std::string text =
      std::string(isa_name(plan.isa)) + ": " + recurrence_reason(plan, shape) + "; " + split_reason(plan, shape);
  if (plan.chunk_steps > 0) {
    text += plan.chunk_steps >= shape.T ? "; the input projection of all " + count(shape.T, "step") + " is one product"
                                        : "; the input projection is one product per " +
                                              count(plan.chunk_steps, "step") + " of " + std::to_string(shape.T);
  }
  if (plan.chunk_steps == 0) text += "; each step multiplies x and h in one go";
  if (shape.D == 2) {
    text += plan.directions_side_by_side ? "; both directions run at the same time" : "; one direction after the other";
  }
  return text;
}

}  // namespace dlk
