// The recurrent kernels of one instruction set for packed weights of int8, in inference with float32. Instruction sets
// that multiply bfloat16 multiply int8 as well: x and h are rounded to int8, a row at a time. The others widen the
// weights as they load them.
#define DLK_INT8_PANELS

#include "rnn/cpu/table.h"
#include "simd/isa.h"

#if DLK_ISA_IS_COMPILED
#include "rnn/cpu/entry.h"

namespace dlk {
const KernelTable DLK_JOIN(kInt8Weights_, DLK_ISA) = {
    DLK_ISA_NAMESPACE::kIsa,       DLK_ISA_NAMESPACE::forward_entry, nullptr, DLK_ISA_NAMESPACE::panel_bytes_entry,
    DLK_ISA_NAMESPACE::pack_entry,
};
}
#else
namespace dlk {
const KernelTable DLK_JOIN(kInt8Weights_, DLK_ISA) = {};
}
#endif
