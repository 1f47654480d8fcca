// Launches in thread block clusters, whose CTAs can access each other's shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "cuda/launch/device.h"

namespace qlora::cuda {

// The largest cluster of kKernel on the device, queried once per device: up to 8 CTAs, fewer if a small device's groups
// of SMs cannot hold them. It is 1 if the device has no clusters, or runs code for an older device because the build
// lacks its own. If the kernel needs more than 48 KB of dynamic shared memory, ctas_per_sm has to be called first.
template <auto kKernel>
cudaError_t ctas_per_cluster(const Device& device, int threads, int shared_bytes, int* ctas) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  std::atomic<int>& here = known[static_cast<size_t>(device.index)];
  *ctas = here.load(std::memory_order_acquire);
  if (*ctas != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
  if (error != cudaSuccess) return error;
  *ctas = 1;
  if (device.arch >= 90 && attributes.ptxVersion >= 90) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(8);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    error = cudaOccupancyMaxPotentialClusterSize(ctas, kKernel, &config);
    if (error != cudaSuccess) return error;
    *ctas = std::clamp(*ctas, 1, 8);
  }
  here.store(*ctas, std::memory_order_release);
  return cudaSuccess;
}

// Like launch_kernel. `cluster` divides `grid`. A cluster of one CTA is an ordinary launch, which every device
// supports.
template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 cluster, int threads, int shared_bytes,
                           cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster.x;
  attribute.val.clusterDim.y = cluster.y;
  attribute.val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace qlora::cuda
