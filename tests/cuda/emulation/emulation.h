// An emulation of CUDA on the CPU, against which the source of a kernel is compiled by a C++ compiler instead of nvcc.
//
// A block runs on one OS thread, and each of its CUDA threads is a fiber of that thread, so __syncthreads and the
// warp's collectives are switches between fibers. Their order depends on a seed (EMULATION_SEED). The blocks of a
// cluster or of a cooperative launch run at the same time; other blocks run one after the other, backwards for an odd
// seed. Shared memory is filled with NaN at first. Deadlocks, divergent barriers and lanes missing from a collective
// end the process with a table of where the threads wait. Under clang's ThreadSanitizer two CUDA threads are ordered
// only by the operations that order them on a GPU. Relaxed stores to global memory become visible late (weak_memory.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

namespace emulation {

struct Position {
  uint3 thread, block;
  dim3 threads, blocks;
  unsigned lane, warp;
  unsigned cluster_rank, cluster_size;
};

extern thread_local const Position* here;

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks in a cluster, along x
  bool cooperative = false;  // all blocks of the grid run at the same time
};
void run(const Launch& launch, const std::function<void()>& kernel);

void block_barrier();
void cluster_barrier();
// Every lane of `mask` passes `size` bytes (at most 16) and receives those of all 32 lanes in `out`.
void warp_exchange(uint32_t mask, const void* in, size_t size, void* out);
// Suspends the calling thread, while the others run, until ready() holds.
void wait_until(const char* what, const std::function<bool()>& ready);
char* shared_memory();
// The address in the shared memory of block `rank` of the cluster that corresponds to `local` in this block's.
void* shared_memory_of(unsigned rank, void* local);
// The receipts of device.h. When a block ends, as many bytes must have arrived as it announced.
void receipt_init(uint64_t* receipt);
void receipt_expect(uint64_t* receipt, unsigned bytes);
void receipt_complete(uint64_t* receipt, unsigned bytes);
void receipt_wait(uint64_t* receipt, unsigned parity);
// What happens beside the loads and stores of pieces (weak_memory.h). load_piece() may replace the value.
void load_piece(const void* piece, uint4* value);
void store_piece(void* piece);
void erase_piece(void* piece);
void release_pieces();
void acquire_pieces();
// Forbids access to the 16 bytes at `gap`, between two arrays in shared memory. Only the address sanitizer enforces it.
void forbid(char* gap);
[[noreturn]] void fail(const char* message);

// An approximate instruction's result for the exact one: up to 2 ulp off, in a direction that depends on its bits, and
// 0 below the smallest normal number.
inline float inexact(float exact) {
  if (std::fabs(exact) < 0x1p-126f) return std::copysign(0.0f, exact);
  uint32_t bits;
  std::memcpy(&bits, &exact, sizeof bits);
  return bits * 2654435761u >> 31 ? exact * (1 + 0x1p-22f) : exact * (1 - 0x1p-22f);
}

template <class T>
T shuffle(uint32_t mask, T value, unsigned source) {
  T all[32];
  warp_exchange(mask, &value, sizeof value, all);
  if (!(mask >> (source & 31) & 1)) fail("a shuffle reads a lane outside its mask");
  return all[source & 31];
}

}  // namespace emulation

// For the host compiler the CUDA headers define these as nothing or as attributes that it does not know.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulation::here->thread)
#define blockIdx (emulation::here->block)
#define blockDim (emulation::here->threads)
#define gridDim (emulation::here->blocks)

inline void __syncthreads() { emulation::block_barrier(); }
// The bytes of the result are those of x (numbers 0 to 3) and y (4 to 7) that the selector's four lowest digits name.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = x | uint64_t{y} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return emulation::shuffle(mask, value, static_cast<unsigned>(source));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emulation::shuffle(mask, value, emulation::here->lane ^ static_cast<unsigned>(lanes));
}
