// What the kernels of every operator share: storage types, instruction sets, threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dlk {

enum class DType : int { f32, f64, bf16, f16 };
// amx is avx512 and a matrix unit for bf16: only attention has kernels of its own for it.
enum class Isa : int { scalar, avx2, avx512, amx };

// The best without the matrix unit.
constexpr Isa vector_isa(Isa isa) { return isa == Isa::amx ? Isa::avx512 : isa; }

// How the kernels reach threads. `parallel` calls fn(ctx, begin, end) for ranges
// that together cover [0, n), from whichever threads it likes, and returns after all.
struct Runtime {
  Isa isa;
  int threads;
  void (*parallel)(int64_t n, void (*fn)(void* ctx, int64_t begin, int64_t end), void* ctx);
};

constexpr int kMaxMembers = 64;

}  // namespace dlk
