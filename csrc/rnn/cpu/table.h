// The entry points of the recurrent kernels of one instruction set.
#pragma once

#include "rnn/params.h"
#include "rnn/cpu/sequence_layout.h"

namespace dlk {

struct KernelTable {
  Isa isa;  // the kernels were compiled for this instruction set, which last_run() reports
  int (*forward)(const ForwardParams&, const void* panels, const Plan&, const Runtime&, const SequenceLayout&);
  int (*backward)(const BackwardParams&, const Plan&, const Runtime&, const SequenceLayout&);
  size_t (*panel_bytes)(const LayerShape&);  // of all directions
  void (*pack)(const LayerShape&, const DirectionWeights*, void* panels);
};

// One table for each row of core/isas.def (kernels_of_isa.cpp); empty if that instruction set has no layer kernels. The
// kernels for weights of fewer bits (bf16_weights and int8_weights) have no backward.
#define DLK_ISA_ROW(name, features, vectors, bf16) \
  extern const KernelTable kLayers_##name, kBf16Weights_##name, kInt8Weights_##name;
#include "core/isas.def"
#undef DLK_ISA_ROW

const KernelTable& kernels(Isa isa, Weights weights);

}  // namespace dlk
