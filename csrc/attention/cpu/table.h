// The attention kernels of each instruction set: one table, filled by isa/attention_<name>.cpp.
#pragma once

#include "tasks.h"
#include "simd/target.h"

namespace dlk {

struct AttentionTable {
  Isa isa;  // what these kernels were compiled for
  // Each returns how many threads took part.
  int (*forward)(const AttentionForwardParams&, const AttentionPlan&, const Runtime&);
  int (*backward)(const AttentionBackwardParams&, const AttentionPlan&, const Runtime&);
  int (*map)(const AttentionMapParams&, const AttentionPlan&, const Runtime&);
};

namespace scalar {
extern const AttentionTable kAttention;
}
#ifdef DLK_X86
namespace avx2 {
extern const AttentionTable kAttention;
}
namespace avx512 {
extern const AttentionTable kAttention;
}
#endif
// These are for plans of bf16 and tiles only.
#ifdef DLK_AVX512_BF16
namespace avx512_bf16 {
extern const AttentionTable kAttention;
}
#endif
#ifdef DLK_AMX
namespace amx {
extern const AttentionTable kAttention;
}
#endif

const AttentionTable& attention_kernels(Isa isa);

}  // namespace dlk
