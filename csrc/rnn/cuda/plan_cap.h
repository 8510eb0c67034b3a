// Limits which plans may be chosen, so that tests can run each kind of kernel at small sizes and benchmarks can compare
// the kinds at equal sizes. No CUDA and no torch in here.
#pragma once

#include <string>

#include "sequence.h"

namespace dlk {

const char* plan_kind_name(SequencePlan::Kind kind);  // "cluster", "grid", "steps"
SequencePlan::Kind plan_kind_from_name(const std::string& name);

// `grid` forbids clusters, `steps` forbids clusters and grids. The cap holds for the whole process.
void set_plan_cap(SequencePlan::Kind best);

// The limits of a GPU reduced to what the cap allows.
GpuLimits capped(GpuLimits limits);

}  // namespace dlk
