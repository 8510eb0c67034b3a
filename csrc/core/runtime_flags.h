// Switches that tests flip and every layer reads.
#pragma once

namespace dlk {

// Outputs and scratch are filled with 0xff bytes (NaN in every float type) right after
// allocation, so that a value which was read before it was written shows.
bool poison();
void set_poison(bool on);

}  // namespace dlk
