// DLK_ISA names the instruction set that a translation unit is compiled for, a row of core/isas.def. The build defines
// it for every kernels_of_isa.cpp; an editor that opens a header alone sees the scalar one.
//
// Code between DLK_ISA_BEGIN and DLK_ISA_END is compiled for that instruction set, in a namespace of its own, dlk::avx2
// for example. Every template that it instantiates must be declared between these marks too (target.h says why).
#pragma once

#include "simd/system.h"

#ifndef DLK_ISA
#define DLK_ISA scalar
#endif

#define DLK_JOIN_TOKENS(a, b) a##b
#define DLK_JOIN(a, b) DLK_JOIN_TOKENS(a, b)

#define DLK_NUMBER_scalar 1
#define DLK_NUMBER_avx2 2
#define DLK_NUMBER_avx512 3
#define DLK_NUMBER_avx512_bf16 4
#define DLK_NUMBER_amx 5
#define DLK_ISA_NUMBER DLK_JOIN(DLK_NUMBER_, DLK_ISA)
#if DLK_ISA_NUMBER == 0
#error "DLK_ISA has no number here: a new row of core/isas.def needs one, and a target in target.h"
#endif

#define DLK_ISA_IS_COMPILED DLK_JOIN(DLK_COMPILES_, DLK_ISA)

// Translation units that define a template differently (with and without DLK_PAIRS, DLK_BF16_PANELS or DLK_INT8_PANELS)
// must not share a namespace, because the linker keeps only one of the definitions.
#ifndef DLK_ISA_NAMESPACE
#if defined(DLK_BF16_PANELS)
#define DLK_ISA_NAMESPACE DLK_JOIN(DLK_ISA, _bf16_panels)
#elif defined(DLK_INT8_PANELS)
#define DLK_ISA_NAMESPACE DLK_JOIN(DLK_ISA, _int8_panels)
#elif defined(DLK_PAIRS) && DLK_ISA_NUMBER >= DLK_NUMBER_avx512_bf16
#define DLK_ISA_NAMESPACE DLK_JOIN(DLK_ISA, _pairs)
#else
#define DLK_ISA_NAMESPACE DLK_ISA
#endif
#endif

#if DLK_ISA_NUMBER == DLK_NUMBER_scalar
#define DLK_ISA_BEGIN namespace dlk::DLK_ISA_NAMESPACE {
#define DLK_ISA_END }
#else
#define DLK_ISA_BEGIN                              \
  DLK_TARGET_BEGIN(DLK_JOIN(DLK_TARGET_, DLK_ISA)) \
  namespace dlk::DLK_ISA_NAMESPACE {
#define DLK_ISA_END \
  }                 \
  DLK_TARGET_END
#endif

namespace dlk::DLK_ISA_NAMESPACE {
constexpr Isa kIsa = Isa::DLK_ISA;
static_assert(DLK_ISA_NUMBER == static_cast<int>(kIsa) + 1, "numbers are positions in core/isas.def, from 1");
// Whether the operands of all products are pairs of bfloat16: in recurrent layers, if the instruction set multiplies
// bfloat16. kTiles tells whether a matrix unit multiplies pairs or quads.
#ifdef DLK_PAIRS
constexpr bool kPairs = bf16_products(kIsa) != Bf16Products::as_float;
#else
constexpr bool kPairs = false;
#endif
// The form of the packed weights. Those of fewer bits are widened as products load them, unless the operands of
// products are quads of int8.
#if defined(DLK_BF16_PANELS)
constexpr Weights kWeights = Weights::bf16;
#elif defined(DLK_INT8_PANELS)
constexpr Weights kWeights = Weights::int8;
#else
constexpr Weights kWeights = Weights::given;
#endif
constexpr bool kQuads = kWeights == Weights::int8 && bf16_products(kIsa) != Bf16Products::as_float;
constexpr bool kTiles = (kPairs || kQuads) && bf16_products(kIsa) == Bf16Products::tiles;
}  // namespace dlk::DLK_ISA_NAMESPACE
