// The threads kernels run on: torch's own pool.
#pragma once

#include "core/types.h"

namespace dlk {

// Threads an op may ask for now: torch.get_num_threads(), and 1 in a forked child, where
// the pool's threads do not exist and waiting for them would never end.
int thread_count();

// The instruction set in force with torch's pool; what every op hands to its kernel.
Runtime current_runtime();

}  // namespace dlk
