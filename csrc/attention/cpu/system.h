// Everything that an attention ISA file needs from outside its target region.
#pragma once

#include <atomic>
#include <new>
#include <type_traits>
#include <utility>

#include "core/scratch.h"
#include "simd/system.h"
#include "table.h"
