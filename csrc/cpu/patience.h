// How long teams wait for their members at least: a switch that tests flip.
#pragma once

#include <cstdint>

namespace dlk {

// On a busy machine the others come later than a call has patience for, and a test of several threads has one. 0: as
// each plan says.
void set_least_patience(int64_t us);

}  // namespace dlk
