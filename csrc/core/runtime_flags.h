// Switches that tests set and all of the code reads.
#pragma once

namespace dlk {

// If on, outputs and scratch are filled with 0xff bytes (NaN in every float type) right after
// allocation, so that results show if a value was read before it was written.
bool poison();
void set_poison(bool on);

}  // namespace dlk
