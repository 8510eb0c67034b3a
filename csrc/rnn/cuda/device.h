// The machine operations that the kernels use, as functions: the only file with inline PTX. Compilers other than nvcc
// get functions that emulate them on the CPU (tests/cuda/emulation), so that the kernels can be tested without a GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DLK_UNROLL _Pragma("unroll")
#else
#include "emulation.h"
#define DLK_UNROLL
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

// One warp computes the 16 x 8 product c += a b over 16 terms, with the fragments of mma.m16n8k16: lane 4 g + q holds
// rows g and g + 8 of a, column g of b, and of c the elements (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
// a[0] and b0 hold the terms 2q and 2q + 1, a[2] and b1 the terms 2q + 8 and 2q + 9. a[1] and a[3] are the same terms
// of row g + 8.
template <class S>
DLK_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<S, bf16_t>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
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

// For data that other blocks write while the kernel runs, which must not be read through L1.
DLK_DEVICE uint4 load_through_l2(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }

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
#endif
}

// Clusters (sm_90 and up). The barrier has two halves, arrive and wait: what was written before arriving can be read
// after waiting, in the shared memory of the cluster's other blocks too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define DLK_HAS_CLUSTERS 0
#else
#define DLK_HAS_CLUSTERS 1
#endif

#if DLK_HAS_CLUSTERS
DLK_DEVICE void cluster_arrive() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  emulation::cluster_arrive();
#endif
}

DLK_DEVICE void cluster_wait() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emulation::cluster_wait();
#endif
}

// Writes to the address that corresponds to `local` in the shared memory of the cluster's block `rank`.
DLK_DEVICE void store_remote(void* local, unsigned rank, uint4 value) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#else
  *static_cast<uint4*>(emulation::shared_memory_of(rank, local)) = value;
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
