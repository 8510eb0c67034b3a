// The kernels of one instruction set for recurrent layers with layer normalisation, zoneout and recurrent dropout.
// Those with a matrix unit run the kernels of the vectors that they are built on.
#define DLK_PAIRS  // with an instruction set that multiplies bfloat16, all products take pairs (simd/isa.h)

#include "rnn/cpu/variants/table.h"
#include "simd/isa.h"

#if DLK_ISA_IS_COMPILED && DLK_ISA_NUMBER <= DLK_NUMBER_avx512_bf16
#include "rnn/cpu/variants/entry.h"

namespace dlk {
const VariantTable DLK_JOIN(kVariants_, DLK_ISA) = {
    DLK_ISA_NAMESPACE::variant_forward_entry,
    DLK_ISA_NAMESPACE::variant_backward_entry,
};
}
#else
namespace dlk {
const VariantTable DLK_JOIN(kVariants_, DLK_ISA) = {};
}
#endif
