// The recurrent kernels, in reading order. Included once per ISA, inside its target
// region and namespace, after Vec and the math of that ISA.
#include "storage_access.h"
#include "tile.h"
#include "dot.h"
#include "panels.h"
#include "gemm.h"
#include "../../cells/lstm.h"
#include "../../cells/gru.h"
#include "../../cells/rnn.h"
#include "weights.h"
#include "forward.h"
#include "backward.h"
#include "entry.h"
