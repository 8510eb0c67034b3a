// Vec with storage conversions, exp, tanh and sigmoid.
#pragma once

#include "simd/common.h"
#include "simd/math.h"
#include "simd/vector.h"
