// Which plans may be taken at all: tests run each kind of kernel at small sizes, benchmarks compare them at equal ones.
// No CUDA and no torch in here.
#pragma once

#include <string>

#include "sequence.h"

namespace dlk {

const char* plan_kind_name(SequencePlan::Kind kind);  // "cluster", "grid", "steps"
SequencePlan::Kind plan_kind_from_name(const std::string& name);

// grid forbids clusters, steps both; of the whole process.
void set_plan_cap(SequencePlan::Kind best);

// What the plans may know of a GPU under the cap.
GpuLimits capped(GpuLimits limits);

}  // namespace dlk
