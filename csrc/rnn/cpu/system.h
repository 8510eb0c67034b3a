// Everything that an ISA file needs from outside its target region.
#pragma once

#include <type_traits>
#include <utility>

#include "core/scratch.h"
#include "simd/system.h"
#include "core/team.h"
#include "table.h"
