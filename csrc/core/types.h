// What the kernels of every operator share: storage types, instruction sets, threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dlk {

enum class DType : int { f32, f64, bf16, f16 };
// avx512_bf16 is avx512 and dot products of bf16, amx that and a matrix unit for bf16: layers have kernels of
// their own for the former, attention for both.
enum class Isa : int { scalar, avx2, avx512, avx512_bf16, amx };

// The best for all that is not bf16.
constexpr Isa vector_isa(Isa isa) { return isa > Isa::avx512 ? Isa::avx512 : isa; }

// How the kernels reach threads. `parallel` calls fn(ctx, begin, end) for ranges
// that together cover [0, n), from whichever threads it likes, and returns after all.
struct Runtime {
  Isa isa;
  int threads;
  void (*parallel)(int64_t n, void (*fn)(void* ctx, int64_t begin, int64_t end), void* ctx);
};

constexpr int kMaxMembers = 64;

}  // namespace dlk
