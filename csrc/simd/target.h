// Regions of code compiled for an instruction set other than the command line's:
//   DLK_TARGET_BEGIN("avx2,fma,f16c")
//   namespace dlk::avx2 { ... }
//   DLK_TARGET_END
// Everything that a region instantiates must be declared inside it: a template
// declared before the region keeps the outer target, which passes vectors by another
// calling convention, and the compiler does not warn.
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

#define DLK_TARGET_avx2 "avx2,fma,f16c"
#ifdef DLK_EMULATE_AVX512  // defined by tests/native/avx512_emulation.h
#define DLK_TARGET_avx512 DLK_TARGET_avx2
#else
#define DLK_TARGET_avx512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#endif

// With DLK_NO_X86 there are only the scalar kernels, as on any processor but x86-64.
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(DLK_NO_X86)
#define DLK_X86 1
#endif

// DLK_NO_AVX512 leaves out all instruction sets above AVX2, which take most of the time to compile.
#if defined(DLK_X86) && !defined(DLK_NO_AVX512)
#define DLK_AVX512 1
#endif

// The instruction sets that multiply bf16 and int8, if the compiler knows them. DLK_OLD_ASSEMBLER says that the
// assembler does not. DLK_EMULATE_BF16 replaces their instructions by plain C++ (bf16_pairs.h), for machines without
// them.
#ifdef DLK_AVX512
#if !defined(DLK_OLD_ASSEMBLER) && !defined(DLK_EMULATE_AVX512)
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define DLK_TARGET_DOTS "avx512bf16,avx512vnni," DLK_TARGET_avx512
#endif
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define DLK_TARGET_TILES "amx-tile,amx-bf16,amx-int8,avx512bf16,avx512vnni," DLK_TARGET_avx512
#endif
#endif
#if defined(DLK_EMULATE_BF16)
#define DLK_AVX512_BF16 1
#define DLK_TARGET_avx512_bf16 DLK_TARGET_avx512
#define DLK_AMX 1
#define DLK_TARGET_amx DLK_TARGET_avx512
#else
#ifdef DLK_TARGET_DOTS
#define DLK_AVX512_BF16 1
#define DLK_TARGET_avx512_bf16 DLK_TARGET_DOTS
#endif
#ifdef DLK_TARGET_TILES
#define DLK_AMX 1
#define DLK_TARGET_amx DLK_TARGET_TILES
#endif
#endif
#endif

// Whether this build has kernels for a row of core/isas.def.
#define DLK_COMPILES_scalar 1
#ifdef DLK_X86
#define DLK_COMPILES_avx2 1
#else
#define DLK_COMPILES_avx2 0
#endif
#ifdef DLK_AVX512
#define DLK_COMPILES_avx512 1
#else
#define DLK_COMPILES_avx512 0
#endif
#ifdef DLK_AVX512_BF16
#define DLK_COMPILES_avx512_bf16 1
#else
#define DLK_COMPILES_avx512_bf16 0
#endif
#ifdef DLK_AMX
#define DLK_COMPILES_amx 1
#else
#define DLK_COMPILES_amx 0
#endif
