// What the recurrent kernels of an instruction set offer.
#pragma once

#include "rnn/params.h"
#include "rnn/cpu/sequence_layout.h"

namespace dlk {

struct KernelTable {
  Isa isa;  // what these kernels were compiled for: what last_run() reports
  int (*forward)(const ForwardParams&, const void* panels, const Plan&, const Runtime&, const SequenceLayout&);
  int (*backward)(const BackwardParams&, const Plan&, const Runtime&, const SequenceLayout&);
  size_t (*panel_bytes)(const LayerShape&);  // of all directions
  void (*pack)(const LayerShape&, const DirectionWeights*, void* panels);
};

// One for each row of core/isas.def (kernels_of_isa.cpp); empty where layers have no kernels of their own.
#define DLK_ISA_ROW(name, features, vectors, bf16) extern const KernelTable kLayers_##name;
#include "core/isas.def"
#undef DLK_ISA_ROW

const KernelTable& kernels(Isa isa);

}  // namespace dlk
