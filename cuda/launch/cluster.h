// Launches in thread block clusters, whose CTAs can access each other's shared memory, and launches that overlap with
// the launch before them.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/launch/device.h"

namespace qlora::cuda {

// When a launch may start: when the previous launch of its stream has ended, or when that launch's CTAs permit it
// (cuda/ptx/grid_dependency.cuh). A kernel that starts early has to wait before it reads what that launch writes.
// At least one of its CTAs has to wait in any case, so that the launch ends after the previous one.
enum class Start { kInOrder, kEarly };

// Returns whether launches may start early: QLORA_CUDA_START=in_order forbids it. Like QLORA_CUDA_KERNEL, the variable
// is read at each launch if it is set at the first one, and never otherwise.
inline bool may_start_early() {
  static const bool looks = std::getenv("QLORA_CUDA_START");
  const char* const value = looks ? std::getenv("QLORA_CUDA_START") : nullptr;
  const std::string start = value ? value : "";
  if (!start.empty() && start != "in_order")
    throw std::invalid_argument("QLORA_CUDA_START: expected in_order or nothing, got " + start);
  return start.empty();
}

// The attributes of a launch. Those that `config` does not count are unused.
struct LaunchAttributes {
  cudaLaunchAttribute list[2];
};

// The configuration of a launch, which refers to `*attributes`. A cluster of one CTA is an ordinary launch, which every
// device supports.
inline cudaLaunchConfig_t cluster_launch(dim3 grid, dim3 cluster, int threads, int shared_bytes, cudaStream_t stream,
                                         Start start, LaunchAttributes* attributes) {
  cudaLaunchConfig_t config = {};
  if (cluster.x * cluster.y * cluster.z > 1) {
    cudaLaunchAttribute& attribute = attributes->list[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster.x;
    attribute.val.clusterDim.y = cluster.y;
    attribute.val.clusterDim.z = cluster.z;
  }
  if (may_start_early() && start == Start::kEarly) {
    cudaLaunchAttribute& attribute = attributes->list[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes->list;
  return config;
}

// The PTX version that the device's code of kKernel was compiled for, such as 90, queried once per device. A build that
// lacks the device's own code runs that of an older one.
template <auto kKernel>
cudaError_t ptx_version(const Device& device, int* version) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  std::atomic<int>& here = known[static_cast<size_t>(device.index)];
  *version = here.load(std::memory_order_acquire);
  if (*version != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
  if (error != cudaSuccess) return error;
  *version = attributes.ptxVersion;
  here.store(*version, std::memory_order_release);
  return cudaSuccess;
}

// The earliest start of kKernel, which waits for the previous launch itself: Start::kEarly if the device's code of the
// kernel was compiled with that wait.
template <auto kKernel>
cudaError_t earliest_start(const Device& device, Start* start) {
  int version = 0;
  const cudaError_t error = device.arch < 90 ? cudaSuccess : ptx_version<kKernel>(device, &version);
  *start = version >= 90 ? Start::kEarly : Start::kInOrder;
  return error;
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
  int version = 0;
  const cudaError_t error = ptx_version<kKernel>(device, &version);
  if (error != cudaSuccess) return error;
  if (version >= 90) {
    LaunchAttributes attributes;
    const cudaLaunchConfig_t config =
        cluster_launch(dim3(kMostClusterCtas), dim3(1), threads, shared_bytes, nullptr, Start::kInOrder, &attributes);
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
  LaunchAttributes attributes;
  const dim3 cluster(static_cast<unsigned>(size));
  const cudaLaunchConfig_t config =
      cluster_launch(cluster, cluster, threads, shared_bytes, nullptr, Start::kInOrder, &attributes);
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
                           cudaStream_t stream, Start start, const Arguments&... arguments) {
  LaunchAttributes attributes;
  const cudaLaunchConfig_t config = cluster_launch(grid, cluster, threads, shared_bytes, stream, start, &attributes);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (cluster.x * cluster.y * cluster.z > 1 && refuses_clusters(error)) {
    cudaGetLastError();
    give_up_clusters();
  }
  return error;
}

}  // namespace qlora::cuda
