// The machine operations that the kernels use, as functions: the only file with inline PTX. Compilers other than nvcc
// get functions that emulate them on the CPU (tests/cuda/emulation), so that the kernels can be tested without a GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DLK_UNROLL _Pragma("unroll")
#define DLK_NO_UNROLL _Pragma("unroll 1")
#else
#include "emulation.h"
#define DLK_UNROLL
#define DLK_NO_UNROLL
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#define DLK_DEVICE __device__ __forceinline__

namespace dlk {

using bf16_t = __nv_bfloat16;
using f16_t = __half;

DLK_DEVICE float to_float(float x) { return x; }
DLK_DEVICE float to_float(bf16_t x) { return __bfloat162float(x); }
DLK_DEVICE float to_float(f16_t x) { return __half2float(x); }
template <class S>
DLK_DEVICE S from_float(float x) {
  if constexpr (sizeof(S) == 4) {
    return x;
  } else if constexpr (std::is_same_v<S, bf16_t>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// Two numbers of 16 bits in a word, rounded by one instruction.
template <class S>
DLK_DEVICE uint32_t pack(float low, float high) {
#ifdef __CUDACC__
  std::conditional_t<std::is_same_v<S, bf16_t>, __nv_bfloat162, __half2> both;
  if constexpr (std::is_same_v<S, bf16_t>) both = __floats2bfloat162_rn(low, high);
  if constexpr (std::is_same_v<S, f16_t>) both = __floats2half2_rn(low, high);
#else
  const S both[2] = {from_float<S>(low), from_float<S>(high)};
#endif
  uint32_t word;
  memcpy(&word, &both, sizeof word);
  return word;
}

// One warp computes the 16 x 8 product c += a b over 16 terms, with the fragments of mma.m16n8k16: lane 4 g + q holds
// rows g and g + 8 of a, column g of b, and of c the elements (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
// a.x and b0 hold the terms 2q and 2q + 1, a.z and b1 the terms 2q + 8 and 2q + 9. a.y and a.w are the same terms of
// row g + 8.
template <class S>
DLK_DEVICE void mma_16x8x16(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<S, bf16_t>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
#else
  const auto item = [](uint32_t word, unsigned k) {
    const uint16_t bits = static_cast<uint16_t>(k & 1 ? word >> 16 : word);
    S value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return to_float(value);
  };
  // Every lane gets the fragments of all lanes, and finds b's column and a's two rows in them.
  uint32_t word[6][32];
  const uint32_t own[6] = {a.x, a.y, a.z, a.w, b0, b1};
  for (int i = 0; i < 6; i += 3) {
    uint32_t all[32][3];
    emulation::warp_exchange(~0u, own + i, sizeof all[0], all);
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 3; ++j) word[i + j][lane] = all[lane][j];
    }
  }
  const unsigned g = emulation::here->lane / 4, q = emulation::here->lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * q + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned holder = k % 8 / 2, upper = k / 8;
      c[i] += item(word[i / 2 + 2 * upper][4 * g + holder], k) * item(word[4 + upper][4 * column + holder], k);
    }
  }
#endif
}

// The index of the thread's warp. The compiler learns from the shuffle that all lanes have the same value, so that what
// depends on it needs no code for lanes that take different branches.
DLK_DEVICE int warp_index() { return static_cast<int>(__shfl_sync(~0u, threadIdx.x / 32, 0)); }

// Returns x, an int or a float. The compiler, which would rather compute a number again, or later, than keep it, does
// not know how to.
template <class T>
DLK_DEVICE T keep_in_register(T x) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, float>) asm volatile("" : "+f"(x));
  if constexpr (std::is_same_v<T, int>) asm volatile("" : "+r"(x));
#endif
  return x;
}

// The same for a pointer into shared memory.
template <class T>
DLK_DEVICE T* keep_shared(T* p) {
#ifdef __CUDACC__
  const int address = keep_in_register(static_cast<int>(__cvta_generic_to_shared(p)));
  return static_cast<T*>(__cvta_shared_to_generic(static_cast<uint32_t>(address)));
#else
  return p;
#endif
}

// 2^x and 1 / x by one instruction each, for the activations of 16-bit layers: at most 2 ulp off, and numbers below
// 2^-126 are taken as 0. 2^x is infinite for large x, and the reciprocal of that 0. NaN stays NaN.
DLK_DEVICE float exp2_approximate(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulation::inexact(std::exp2(x));
#endif
}

DLK_DEVICE float reciprocal_approximate(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulation::inexact(1.0f / x);
#endif
}

// The block's dynamic shared memory, aligned to 128 bytes.
DLK_DEVICE char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return emulation::shared_memory();
#endif
}

// Bytes between two arrays in shared memory that the address sanitizer watches under emulation; none on a GPU.
#ifdef __CUDACC__
constexpr int kSharedGap = 0;
DLK_DEVICE void forbid_gap(char*) {}
#else
constexpr int kSharedGap = 16;
inline void forbid_gap(char* gap) { emulation::forbid(gap); }
#endif

// Flags in global memory, for blocks that are all resident. A block writes data and calls __syncthreads(), then one of
// its threads signals. Another block may read that data after one of its threads has waited for the signal and the
// block has called __syncthreads().
DLK_DEVICE void signal_arrival(unsigned* counter) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#else
  emulation::release_pieces();
  __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE);
#endif
}

DLK_DEVICE void wait_for_arrivals(const unsigned* counter, unsigned goal) {
#ifdef __CUDACC__
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (static_cast<int>(seen - goal) < 0);  // correct even after very many steps, when the counter has wrapped
#else
  emulation::wait_until("at the grid's barrier",
                        [=] { return static_cast<int>(__atomic_load_n(counter, __ATOMIC_RELAXED) - goal) >= 0; });
  __atomic_load_n(counter, __ATOMIC_ACQUIRE);
  emulation::acquire_pieces();
#endif
}

// Pieces: 16 bytes in global memory that one block writes and others read without a barrier in between. A piece whose
// words are kAbsentWord has not been written yet, and no data may contain that word. A 32-bit word is read and written
// as a whole, 16 bytes are not, so a reader checks all four words. Loads go to L2, where all blocks meet.
constexpr uint32_t kAbsentWord = 0xffffffff;

DLK_DEVICE bool is_absent(const uint4& piece) {
  return piece.x == kAbsentWord || piece.y == kAbsentWord || piece.z == kAbsentWord || piece.w == kAbsentWord;
}

// The piece is `offset` bytes behind `base`. As long as the offset is known when this is compiled, it becomes a part of
// the instruction, and pieces of one vector share the registers of their base.
DLK_DEVICE uint4 load_piece(const void* base, int offset = 0) {
  uint4 v;
#ifdef __CUDACC__
  asm volatile("{ .reg .u64 at; add.s64 at, %4, %5; ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [at]; }"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(base), "l"(static_cast<int64_t>(offset))
               : "memory");
#else
  const uint32_t* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(base) + offset);
  v.x = __atomic_load_n(words, __ATOMIC_RELAXED), v.y = __atomic_load_n(words + 1, __ATOMIC_RELAXED);
  v.z = __atomic_load_n(words + 2, __ATOMIC_RELAXED), v.w = __atomic_load_n(words + 3, __ATOMIC_RELAXED);
  emulation::load_piece(words, &v);
#endif
  return v;
}

DLK_DEVICE void store_piece(void* p, const uint4& v) {
#ifdef __CUDACC__
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  emulation::store_piece(p);
  uint32_t* words = static_cast<uint32_t*>(p);
  __atomic_store_n(words, v.x, __ATOMIC_RELAXED), __atomic_store_n(words + 1, v.y, __ATOMIC_RELAXED);
  __atomic_store_n(words + 2, v.z, __ATOMIC_RELAXED), __atomic_store_n(words + 3, v.w, __ATOMIC_RELAXED);
#endif
}

// Makes a piece absent again. Like any store, it may reach the other blocks late: surely only after a signal.
DLK_DEVICE void erase_piece(void* p) {
#ifdef __CUDACC__
  store_piece(p, make_uint4(kAbsentWord, kAbsentWord, kAbsentWord, kAbsentWord));
#else
  emulation::erase_piece(p);
#endif
}

// Loads a piece again that was absent. The threads of a block take turns under emulation, so there it lets the others
// run until the piece has arrived.
DLK_DEVICE uint4 load_absent_piece(const void* base, int offset = 0) {
#ifndef __CUDACC__
  const uint32_t* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(base) + offset);
  emulation::wait_until("for a piece from another block", [=] {
    bool there = true;
    for (int i = 0; i < 4; ++i) there &= __atomic_load_n(words + i, __ATOMIC_RELAXED) != kAbsentWord;
    return there;
  });
#endif
  return load_piece(base, offset);
}

// Clusters (sm_90 and up).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define DLK_HAS_CLUSTERS 0
#else
#define DLK_HAS_CLUSTERS 1
#endif

#if DLK_HAS_CLUSTERS
// What any thread of the cluster wrote before the barrier can be read after it by every other.
DLK_DEVICE void cluster_barrier() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emulation::cluster_barrier();
#endif
}

// A receipt: an object in shared memory that counts the bytes which the blocks of the cluster send to its block
// (PTX: mbarrier). Its phases follow each other. A phase ends when its bytes have been announced by receipt_expect()
// and have all arrived, in whichever order that happens. A thread that has waited for the end of a phase can read what
// was sent in it.
//
// After receipt_init(), by one thread, comes a cluster_barrier().
DLK_DEVICE void receipt_init(uint64_t* receipt) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(receipt));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulation::receipt_init(receipt);
#endif
}

// Announces how many bytes the phase has. One thread calls it once in each phase, after the end of the phase before.
DLK_DEVICE void receipt_expect(uint64_t* receipt, unsigned bytes) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(receipt));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
#else
  __atomic_load_n(receipt, __ATOMIC_RELAXED);  // for the sanitizers
  emulation::receipt_expect(receipt, bytes);
#endif
}

// Waits for the end of a phase. `parity` is the number of the phase modulo 2. A thread may not be two phases late.
DLK_DEVICE void receipt_wait(uint64_t* receipt, unsigned parity) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(receipt));
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
#else
  __atomic_load_n(receipt, __ATOMIC_RELAXED);
  emulation::receipt_wait(receipt, parity);
#endif
}

// Writes to the address that corresponds to `local` in the shared memory of the cluster's block `rank`, and then counts
// the bytes in that block's receipt.
DLK_DEVICE void send_to_block(void* local, uint64_t* receipt, unsigned rank, const uint4& value) {
#ifdef __CUDACC__
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  const uint32_t counted = static_cast<uint32_t>(__cvta_generic_to_shared(receipt));
  uint32_t remote_to, remote_counted;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_to) : "r"(to), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_counted) : "r"(counted), "r"(rank));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote_to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(remote_counted)
      : "memory");
#else
  *static_cast<uint4*>(emulation::shared_memory_of(rank, local)) = value;
  uint64_t* there = static_cast<uint64_t*>(emulation::shared_memory_of(rank, receipt));
  __atomic_load_n(there, __ATOMIC_RELAXED);
  emulation::receipt_complete(there, sizeof value);
#endif
}
#endif

// The rest of this file is for the host. launch() and set_zero() return CUDA's error number, 0 for success.
struct LaunchShape {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1, threads = 1;
  int shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

template <class Params>
int launch(void (*kernel)(Params), const LaunchShape& shape, void* stream, const Params& params) {
  if (shape.grid_x == 0) return 0;  // there is nothing to do, and CUDA refuses an empty grid
#ifdef __CUDACC__
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > 48 << 10) {
    // Allows the maximum, not just what this call needs: another thread may be about to launch the kernel with more.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error) return error;
  }
  if (shape.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error) return error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, params);
#else
  (void)stream;
  emulation::Launch grid;
  grid.grid = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  grid.block = dim3(shape.threads);
  grid.shared_bytes = static_cast<size_t>(shape.shared_bytes);
  grid.cluster = shape.cluster;
  grid.cooperative = shape.cooperative;
  emulation::run(grid, [&] { kernel(params); });
  return 0;
#endif
}

inline int set_zero(void* data, size_t bytes, void* stream) {
#ifdef __CUDACC__
  return cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
#else
  (void)stream;
  std::memset(data, 0, bytes);
  return 0;
#endif
}

}  // namespace dlk
