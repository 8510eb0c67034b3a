#include "gpu_limits.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace dlk {
namespace {

__global__ void __launch_bounds__(kSequenceThreads, 1) stand_in(int) {}

// How many clusters of this many blocks are resident at once, if each block fills a multiprocessor.
int resident_clusters(int blocks, int shared_bytes) {
  const void* kernel = reinterpret_cast<const void*>(&stand_in);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kSequenceThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return clusters;
}

}  // namespace

GpuLimits gpu_limits(int device) {
  static std::mutex mutex;
  static std::map<int, GpuLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  GpuLimits limits{};
  int major = 0;
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major >= 9) {
    // The driver answers for the current device, which may be another one if the caller only asks for a plan.
    int current = device;
    cudaGetDevice(&current);
    if (current != device) cudaSetDevice(device);
    // Each size is asked for, because the documentation only gives the largest.
    for (int n = 1; n <= kMaxCluster; ++n) limits.clusters[n] = resident_clusters(n, limits.shared_bytes);
    if (current != device) cudaSetDevice(current);
  }
  known[device] = limits;
  return limits;
}

const char* gpu_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dlk
