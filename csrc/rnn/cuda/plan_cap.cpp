#include "plan_cap.h"

#include <atomic>
#include <stdexcept>

namespace dlk {
namespace {

constexpr SequencePlan::Kind kKinds[] = {SequencePlan::cluster, SequencePlan::grid, SequencePlan::steps};
std::atomic<SequencePlan::Kind> cap{SequencePlan::cluster};

}  // namespace

const char* plan_kind_name(SequencePlan::Kind kind) {
  static const char* const names[] = {"cluster", "grid", "steps"};
  return names[kind];
}

SequencePlan::Kind plan_kind_from_name(const std::string& name) {
  for (SequencePlan::Kind kind : kKinds) {
    if (name == plan_kind_name(kind)) return kind;
  }
  throw std::invalid_argument("unknown kind of plan '" + name + "', expected cluster, grid or steps");
}

void set_plan_cap(SequencePlan::Kind best) { cap = best; }

GpuLimits capped(GpuLimits limits) {
  const SequencePlan::Kind best = cap;
  if (best != SequencePlan::cluster) {
    for (int& n : limits.clusters) n = 0;
  }
  if (best == SequencePlan::steps) limits.multiprocessors = 0;
  return limits;
}

}  // namespace dlk
