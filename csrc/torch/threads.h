// The threads on which kernels run: torch's own pool.
#pragma once

#include "core/types.h"

namespace dlk {

// The number of threads that an op may ask for now: torch.get_num_threads(), but 1 in a forked
// child, where the pool's threads do not exist and waiting for them would never end.
int thread_count();

// What every op passes to its kernel: the instruction set in force, and torch's pool.
Runtime current_runtime();

}  // namespace dlk
