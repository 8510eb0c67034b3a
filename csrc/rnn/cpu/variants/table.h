// The entry points of the kernels for variants of one instruction set.
#pragma once

#include "rnn/cpu/sequence_layout.h"
#include "rnn/variants.h"

namespace dlk {

struct VariantTable {
  int (*forward)(const VariantForwardParams&, const Plan&, const Runtime&, const SequenceLayout&);
  int (*backward)(const VariantBackwardParams&, const Plan&, const Runtime&, const SequenceLayout&);
};

// One table for each row of core/isas.def; empty if that instruction set has no kernels of its own here.
#define DLK_ISA_ROW(name, features, vectors, bf16) extern const VariantTable kVariants_##name;
#include "core/isas.def"
#undef DLK_ISA_ROW

}  // namespace dlk
