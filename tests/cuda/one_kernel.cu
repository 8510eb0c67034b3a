// Two sequence kernels, with which compiled.py tests its checks of machine code: the forward of the lstm in bfloat16,
// in clusters and in grids.
#include "rnn/cuda/sequence_forward.h"

namespace dlk {
namespace gpu {

constexpr int kGridUnits = slice_units(4, SliceWidth::grid), kClusterUnits = slice_units(4, SliceWidth::cluster);

template __global__ void sequence_forward<LstmCell, bf16_t, true, kClusterUnits, 8>(
    const __grid_constant__ SequenceForward p);
template __global__ void sequence_forward<LstmCell, bf16_t, false, kGridUnits, 8>(
    const __grid_constant__ SequenceForward p);

}  // namespace gpu
}  // namespace dlk
