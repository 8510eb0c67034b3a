// What the kernels of every operator share: storage types, instruction sets, threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dlk {

enum class DType : int { f32, f64, bf16, f16 };

// How an instruction set multiplies bfloat16: widened to float, by dot products of pairs, or by a matrix unit.
enum class Bf16Products : int { as_float, dots, tiles };

// The form in which a layer's packed weights are kept: in the dtype of the call, or in fewer bits.
enum class Weights : int { given, bf16, int8 };

enum class Isa : int {
#define DLK_ISA_ROW(name, features, vectors, bf16) name,
#include "core/isas.def"
#undef DLK_ISA_ROW
};

constexpr size_t kIsaCount = 0
#define DLK_ISA_ROW(name, features, vectors, bf16) +1
#include "core/isas.def"
#undef DLK_ISA_ROW
    ;

// The instruction set whose Vec does all arithmetic except products of bfloat16.
constexpr Isa vector_isa(Isa isa) {
  switch (isa) {
#define DLK_ISA_ROW(name, features, vectors, bf16) \
  case Isa::name:                                  \
    return Isa::vectors;
#include "core/isas.def"
#undef DLK_ISA_ROW
  }
  return Isa::scalar;
}

constexpr Bf16Products bf16_products(Isa isa) {
  switch (isa) {
#define DLK_ISA_ROW(name, features, vectors, bf16) \
  case Isa::name:                                  \
    return Bf16Products::bf16;
#include "core/isas.def"
#undef DLK_ISA_ROW
  }
  return Bf16Products::as_float;
}

#define DLK_ISA_ROW(name, features, vectors, bf16)                                                     \
  static_assert(Isa::vectors == Isa::name || bf16_products(Isa::name) != Bf16Products::as_float, #name \
                ": kernels of float32 would never run; only rows that add products of bfloat16 have others' vectors");
#include "core/isas.def"
#undef DLK_ISA_ROW

// What a call runs on. `parallel` calls fn(ctx, begin, end) for ranges that together
// cover [0, n), on any threads, and returns when all of these calls have returned.
struct Runtime {
  Isa isa;
  int threads;
  void (*parallel)(int64_t n, void (*fn)(void* ctx, int64_t begin, int64_t end), void* ctx);
};

constexpr int kMaxMembers = 64;

}  // namespace dlk
