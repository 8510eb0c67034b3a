// Selects the instruction set that the kernels use: the best that the CPU and the OS offer, at most the one that the
// environment variable DLKERNELS_CPU_ISA names. set_isa() overrides the choice.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/types.h"

namespace dlk {

const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // throws std::invalid_argument naming the valid ones

// Names of features and whether the CPU reports them; "os_*" tells which registers the OS saves, "amx_granted" whether
// this process requested the permission to use tiles and got it.
const std::vector<std::pair<const char*, bool>>& cpu_features();

std::vector<Isa> compiled_isas();
// The compiled ones that this machine can run and DLKERNELS_CPU_ISA allows, lowest first. Like current_isa() and
// set_isa() it throws std::invalid_argument if DLKERNELS_CPU_ISA holds an unknown name.
std::vector<Isa> available_isas();

// The instruction set in force.
Isa current_isa();
void set_isa(Isa isa);  // throws std::invalid_argument also if `isa` is not available
void reset_isa();       // back to the choice by environment and CPU

// Whether the machine leaves this process only the scalar kernels, and nobody asked for them, by DLKERNELS_CPU_ISA or
// set_isa(). torch has vector instructions on such a machine too, so calls that its operators can serve are left to it.
bool prefers_torch();

// Makes the process take the machine for one without vector kernels. For tests.
void pretend_scalar_machine(bool on);

}  // namespace dlk
