// What the attention kernels of an instruction set offer.
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

// One for each row of core/isas.def (kernels_of_isa.cpp); empty where the compiler does not know it.
#define DLK_ISA_ROW(name, features, vectors, bf16) extern const AttentionTable kAttention_##name;
#include "core/isas.def"
#undef DLK_ISA_ROW

const AttentionTable& attention_kernels(Isa isa);

}  // namespace dlk
