// The attention kernels of one instruction set. The build compiles this file once for each row of core/isas.def, with
// DLK_ISA as its name.
#include "attention/cpu/table.h"
#include "simd/isa.h"

#if DLK_ISA_IS_COMPILED
#include "attention/cpu/entry.h"

namespace dlk {
const AttentionTable DLK_JOIN(kAttention_, DLK_ISA) = DLK_ISA_NAMESPACE::kAttention;
}
#else
namespace dlk {
const AttentionTable DLK_JOIN(kAttention_, DLK_ISA) = {};
}
#endif
