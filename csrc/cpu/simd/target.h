// Regions of code compiled for an instruction set other than the command line's:
//   DLK_TARGET_BEGIN("avx2,fma,f16c")
//   namespace dlk::avx2 { ... }
//   DLK_TARGET_END
// Everything a region instantiates must be declared inside it: a template from
// before the region keeps the outer target and another calling convention for
// vectors, and the compiler does not warn.
#pragma once

#define DLK_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define DLK_TARGET_BEGIN(isa) DLK_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define DLK_TARGET_END _Pragma("clang attribute pop")
#define DLK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define DLK_TARGET_BEGIN(isa) _Pragma("GCC push_options") DLK_PRAGMA(GCC target(isa))
#define DLK_TARGET_END _Pragma("GCC pop_options")
#define DLK_UNROLL _Pragma("GCC unroll 16")
#endif

#define DLK_INLINE inline __attribute__((always_inline))
#define DLK_NOINLINE __attribute__((noinline))

#define DLK_TARGET_AVX2 "avx2,fma,f16c"
#define DLK_TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"

#if defined(__x86_64__) || defined(_M_X64)
#define DLK_X86 1
#endif

// The matrix unit, where the compiler knows it; DLK_NO_TILES is for an assembler that does not. DLK_EMULATE_AMX puts
// plain C++ in its place (amx_tiles.h), for machines without.
#ifdef DLK_X86
#if !defined(DLK_NO_TILES) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define DLK_TARGET_TILES "amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#endif
#if defined(DLK_EMULATE_AMX)
#define DLK_AMX 1
#define DLK_TARGET_AMX DLK_TARGET_AVX512
#elif defined(DLK_TARGET_TILES)
#define DLK_AMX 1
#define DLK_TARGET_AMX DLK_TARGET_TILES
#endif
#endif
