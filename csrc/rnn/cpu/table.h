// What each instruction set offers: one table, filled by isa/<name>.cpp.
#pragma once

#include "rnn/params.h"
#include "sequence_layout.h"
#include "simd/target.h"

namespace dlk {

struct KernelTable {
  Isa isa;  // what these kernels were compiled for: what last_run() reports
  int (*forward)(const ForwardParams&, const void* panels, const Plan&, const Runtime&, const SequenceLayout&);
  int (*backward)(const BackwardParams&, const Plan&, const Runtime&, const SequenceLayout&);
  size_t (*panel_bytes)(const LayerShape&);  // of all directions
  void (*pack)(const LayerShape&, const DirectionWeights*, void* panels);
};

namespace scalar {
extern const KernelTable kKernels;
}
#ifdef DLK_X86
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
#endif
#ifdef DLK_AVX512_BF16
namespace avx512_bf16_layers {
extern const KernelTable kKernels;  // for bf16 of layers that layer_isa() gives to it only
}
#endif

const KernelTable& kernels(Isa isa);

}  // namespace dlk
