// Launches in thread block clusters, whose CTAs can access each other's shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "cuda/launch/device.h"

namespace qlora::cuda {

// The configuration of a launch, which refers to `*attribute`. A cluster of one CTA is an ordinary launch, which every
// device supports.
inline cudaLaunchConfig_t cluster_launch(dim3 grid, dim3 cluster, int threads, int shared_bytes, cudaStream_t stream,
                                         cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = cluster.x;
  attribute->val.clusterDim.y = cluster.y;
  attribute->val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 1 : 0;
  return config;
}

// The largest cluster of kKernel on the device, queried once per device: up to kMostClusterCtas, fewer if a small
// device's groups of SMs cannot hold them. It is 1 if the device has no clusters, if the driver cannot tell (seen on
// parts of devices and with some drivers for 12.x), or if the device runs code for an older one because the build lacks
// its own. If the kernel needs more than 48 KB of dynamic shared memory, ctas_per_sm has to be called first.
template <auto kKernel>
cudaError_t ctas_per_cluster(const Device& device, int threads, int shared_bytes, int* ctas) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  *ctas = 1;
  if (!device.has_clusters) return cudaSuccess;
  std::atomic<int>& here = known[static_cast<size_t>(device.index)];
  if (const int found = here.load(std::memory_order_acquire); found != 0) {
    *ctas = found;
    return cudaSuccess;
  }
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
  if (error != cudaSuccess) return error;
  if (attributes.ptxVersion >= 90) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config =
        cluster_launch(dim3(kMostClusterCtas), dim3(1), threads, shared_bytes, nullptr, &attribute);
    if (cudaOccupancyMaxPotentialClusterSize(ctas, kKernel, &config) != cudaSuccess) {
      cudaGetLastError();
      *ctas = 1;
    }
    *ctas = std::clamp(*ctas, 1, kMostClusterCtas);
  }
  here.store(*ctas, std::memory_order_release);
  return cudaSuccess;
}

// The number of clusters of `size` CTAs that the current device holds at once. As for ctas_per_cluster, ctas_per_sm has
// to be called first.
template <class... Parameters>
cudaError_t count_clusters(void (*kernel)(Parameters...), int size, int threads, int shared_bytes, int* clusters) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = cluster_launch(dim3(static_cast<unsigned>(size)), dim3(static_cast<unsigned>(size)),
                                                   threads, shared_bytes, nullptr, &attribute);
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

// The errors of a launch whose clusters the driver refuses, and not of an earlier kernel.
constexpr bool refuses_clusters(cudaError_t error) {
  return error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration ||
         error == cudaErrorLaunchOutOfResources || error == cudaErrorNotSupported;
}

// Like launch_kernel. `cluster` divides `grid`. If the driver refuses the cluster although it has answered the query,
// the device gives up clusters, and the caller of the operator's launcher can launch again.
template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 cluster, int threads, int shared_bytes,
                           cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = cluster_launch(grid, cluster, threads, shared_bytes, stream, &attribute);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (config.numAttrs > 0 && refuses_clusters(error)) {
    cudaGetLastError();
    give_up_clusters();
  }
  return error;
}

}  // namespace qlora::cuda
