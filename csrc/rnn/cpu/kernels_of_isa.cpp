// The recurrent kernels of one instruction set. The build compiles this file once for each row of core/isas.def, with
// DLK_ISA as its name.
#define DLK_PAIRS  // where there are dot products of bfloat16, all products are of pairs

#include "rnn/cpu/table.h"
#include "simd/isa.h"

// The matrix unit has no kernels for layers: rnn_plan gives them the dot products.
#if DLK_ISA_IS_COMPILED && DLK_ISA_NUMBER != DLK_NUMBER_amx
#include "rnn/cpu/entry.h"

namespace dlk {
const KernelTable DLK_JOIN(kLayers_, DLK_ISA) = DLK_ISA_NAMESPACE::kKernels;
}
#else
namespace dlk {
const KernelTable DLK_JOIN(kLayers_, DLK_ISA) = {};
}
#endif
