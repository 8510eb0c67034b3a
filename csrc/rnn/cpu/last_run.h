// Remembers what rnn_last_run() reports.
#pragma once

#include "rnn/params.h"

namespace dlk {

void set_last_run(const LastRun& run);

}  // namespace dlk
