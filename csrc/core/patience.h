// How long teams wait for their members at least: a switch that tests flip.
#pragma once

#include <cstdint>

namespace dlk {

// On a busy machine the other threads may come after the plan's patience has run out, and a test of several threads
// would run on one. This is the least that a call waits; 0 leaves it to the plan.
void set_least_patience(int64_t us);

}  // namespace dlk
