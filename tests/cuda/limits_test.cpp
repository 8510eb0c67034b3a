// Tests gpu_limits() on a made-up GPU: the functions of CUDA's runtime that it calls are replaced.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

// For the host compiler these are attributes that it does not know.
#undef __global__
#undef __launch_bounds__
#define __global__
#define __launch_bounds__(...)
#include "rnn/cuda/gpu_limits.cu"

namespace {

int current = 0, asked = 0, major = 9;
bool non_portable = false;

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  current = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t) { return "an error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 132
           : attribute == cudaDevAttrComputeCapabilityMajor       ? major
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) non_portable = value == 1;
  return cudaSuccess;
}

// This GPU runs no clusters of 5 blocks, and none of more than 8 that were not allowed.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  ++asked;
  require(current == 1, "asked about another device");
  require(config->numAttrs == 1 && config->attrs[0].id == cudaLaunchAttributeClusterDimension,
          "asked without a cluster");
  const unsigned n = config->attrs[0].val.clusterDim.x;
  require(config->gridDim.x == n && config->blockDim.x == dlk::kSequenceThreads, "asked about another launch");
  require(config->dynamicSmemBytes == 232448, "asked about blocks that share a multiprocessor");
  *clusters = n == 5 ? 0 : static_cast<int>(100 + n);
  return n > 8 && !non_portable ? cudaErrorInvalidClusterSize : cudaSuccess;
}
}

int main() {
  const dlk::GpuLimits limits = dlk::gpu_limits(1);
  require(limits.multiprocessors == 132 && limits.shared_bytes == 232448, "other limits");
  for (int n = 1; n <= dlk::kMaxCluster; ++n) require(limits.clusters[n] == (n == 5 ? 0 : 100 + n), "other clusters");
  require(limits.has_clusters() && current == 0, "the current device has changed");
  require(asked == dlk::kMaxCluster, "a size was not asked for");
  dlk::gpu_limits(1);
  require(asked == dlk::kMaxCluster, "asked twice");
  major = 8;
  require(!dlk::gpu_limits(0).has_clusters() && asked == dlk::kMaxCluster, "clusters on an old GPU");
  std::printf("the limits hold\n");
}
