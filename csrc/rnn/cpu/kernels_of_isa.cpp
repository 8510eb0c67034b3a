// The recurrent kernels of one instruction set. The build compiles this file once for each row of core/isas.def, with
// DLK_ISA as its name.
#define DLK_PAIRS  // with an instruction set that multiplies bfloat16, all products take pairs (simd/isa.h)

#include "rnn/cpu/table.h"
#include "simd/isa.h"

#if DLK_ISA_IS_COMPILED
#include "rnn/cpu/backward_entry.h"

namespace dlk {
const KernelTable DLK_JOIN(kLayers_, DLK_ISA) = {
    DLK_ISA_NAMESPACE::kIsa,           DLK_ISA_NAMESPACE::forward_entry,
    DLK_ISA_NAMESPACE::backward_entry, DLK_ISA_NAMESPACE::panel_bytes_entry,
    DLK_ISA_NAMESPACE::pack_entry,
};
}
#else
namespace dlk {
const KernelTable DLK_JOIN(kLayers_, DLK_ISA) = {};
}
#endif
