// Which sizes of clusters a GPU runs: for each of 1 to 16 blocks, as large as those of the sequence kernels, the number
// of clusters that are resident at once according to the driver, and whether a launch of them exchanges data.
// Prints a JSON object for each size; the exit status is 1 if a size that the driver promises does not work.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>

#include "rnn/cuda/sequence.h"

namespace {

// Each block writes its number into the shared memory of the next block of its cluster, which checks it.
__global__ void __launch_bounds__(dlk::kSequenceThreads, 1) pass_on(int* wrong) {
#if __CUDA_ARCH__ >= 900
  __shared__ int received;
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const unsigned size = cluster.num_blocks(), rank = cluster.block_rank();
  cluster.sync();
  if (threadIdx.x == 0) *cluster.map_shared_rank(&received, (rank + 1) % size) = static_cast<int>(rank);
  cluster.sync();
  if (threadIdx.x == 0 && received != static_cast<int>((rank + size - 1) % size)) atomicAdd(wrong, 1);
#else
  if (threadIdx.x == 0) atomicAdd(wrong, 1);
#endif
}

int failed(const char* what, cudaError_t error) {
  if (error) std::printf("{\"failed\": \"%s: %s\"}\n", what, cudaGetErrorString(error));
  return error != cudaSuccess;
}

int run() {
  int most_shared = 0, multiprocessors = 0;
  if (failed("device", cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0))) return 1;
  if (failed("device", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0))) return 1;
  const void* kernel = reinterpret_cast<const void*>(&pass_on);
  const int shared = most_shared - 1024;  // the rest is for `received`
  if (failed("shared", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))) return 1;
  if (failed("size", cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))) return 1;
  int* wrong = nullptr;
  if (failed("memory", cudaMalloc(&wrong, sizeof *wrong))) return 1;
  int failures = 0;
  for (int size = 1; size <= 16; ++size) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    // More clusters than are resident at once, so that some wait for others.
    config.gridDim = dim3(static_cast<unsigned>(size * (2 * multiprocessors / size + 1)));
    config.blockDim = dim3(dlk::kSequenceThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int resident = 0, misses = 0;
    cudaError_t error = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
    const char* occupancy = cudaGetErrorString(error);
    if (!error) error = cudaMemset(wrong, 0, sizeof *wrong);
    if (!error) error = cudaLaunchKernelEx(&config, &pass_on, wrong);
    if (!error) error = cudaMemcpy(&misses, wrong, sizeof misses, cudaMemcpyDeviceToHost);
    const bool works = !error && misses == 0;
    std::printf("{\"blocks\": %d, \"resident_clusters\": %d, \"occupancy\": \"%s\", \"launch\": \"%s\"}\n", size,
                resident, occupancy,
                error    ? cudaGetErrorString(error)
                : misses ? "wrong data"
                         : "no error");
    std::fflush(stdout);
    cudaGetLastError();
    failures += resident > 0 && !works;
  }
  return failures;
}

}  // namespace

int main() { return run() != 0; }
