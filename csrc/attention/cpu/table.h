// The table of attention kernels of an instruction set.
#pragma once

#include "attention/cpu/tasks.h"

namespace dlk {

struct AttentionTable {
  Isa isa;  // what these kernels were compiled for
  // Each returns how many threads took part.
  int (*forward)(const AttentionForwardParams&, const AttentionPlan&, const Runtime&);
  int (*backward)(const AttentionBackwardParams&, const AttentionPlan&, const Runtime&);
  int (*map)(const AttentionMapParams&, const AttentionPlan&, const Runtime&);
};

// There is one table for each row of core/isas.def (kernels_of_isa.cpp); it is empty if this build has no such kernels.
#define DLK_ISA_ROW(name, features, vectors, bf16) extern const AttentionTable kAttention_##name;
#include "core/isas.def"
#undef DLK_ISA_ROW

// The table of `isa`, or that of the scalar kernels if this build has none for `isa`.
const AttentionTable& attention_kernels(Isa isa);

}  // namespace dlk
