// Which instruction set the kernels use: what the CPU and the OS offer, capped by the
// environment variable DLKERNELS_CPU_ISA, overridden by set_isa().
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/types.h"

namespace dlk {

const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // throws std::invalid_argument naming the valid ones

// Name and presence, as the CPU reports them; "os_*" tells which registers the OS saves, "amx_granted" whether this
// process asked for the tiles and got them.
const std::vector<std::pair<const char*, bool>>& cpu_features();

std::vector<Isa> compiled_isas();
std::vector<Isa> available_isas();  // of those, what this machine can run and the environment allows; lowest first

// The one in force. These throw std::invalid_argument where DLKERNELS_CPU_ISA holds an unknown name.
Isa current_isa();
void set_isa(Isa isa);  // ... or where isa is not available
void reset_isa();       // back to the environment and the CPU

}  // namespace dlk
