// Everything that an ISA file needs from outside its target region.
#pragma once

#include <type_traits>
#include <utility>

#include "../scratch.h"
#include "../simd/system.h"
#include "../team.h"
#include "kernels.h"
