// The least time that teams wait for their threads, which tests set.
#pragma once

#include <cstdint>

namespace dlk {

// Makes every call wait at least `us` microseconds for its threads; with 0 the plan alone decides. On a busy machine
// threads may arrive after the plan's patience has run out, and a test of several threads would run on one.
void set_least_patience(int64_t us);

}  // namespace dlk
