// The recurrent kernels of one instruction set that widen packed weights of bfloat16 as they load them: for inference
// in float32, where few sequences are bound by the traffic of the weights. Instruction sets that multiply bfloat16 need
// none, because the panels of their own products have 16 bits a value.
#define DLK_BF16_PANELS

#include "rnn/cpu/table.h"
#include "simd/isa.h"

#if DLK_ISA_IS_COMPILED && DLK_ISA_NUMBER < DLK_NUMBER_avx512_bf16
#include "rnn/cpu/entry.h"

namespace dlk {
const KernelTable DLK_JOIN(kBf16Weights_, DLK_ISA) = {
    DLK_ISA_NAMESPACE::kIsa,       DLK_ISA_NAMESPACE::forward_entry, nullptr, DLK_ISA_NAMESPACE::panel_bytes_entry,
    DLK_ISA_NAMESPACE::pack_entry,
};
}
#else
namespace dlk {
const KernelTable DLK_JOIN(kBf16Weights_, DLK_ISA) = {};
}
#endif
