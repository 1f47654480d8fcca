// Kernel launches whose errors are their own, and what the current device makes of a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "cuda/launch/device.h"

namespace qlora::cuda {

// A launch's own error: cudaGetLastError after <<<>>> would also find what an earlier call of somebody else left there.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// How many CTAs of kKernel an SM of the device holds at once, at least 1. Asked once a device; the first call also lets
// the kernel have `shared_bytes` of dynamic shared memory, so it comes before the first launch.
template <auto kKernel>
cudaError_t ctas_per_sm(const Device& device, int threads, int shared_bytes, int* ctas) {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  std::atomic<int>& here = known[static_cast<size_t>(device.index)];
  *ctas = here.load(std::memory_order_acquire);
  if (*ctas != 0) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, kKernel, threads, shared_bytes);
  if (error != cudaSuccess) return error;
  if (*ctas < 1) *ctas = 1;
  here.store(*ctas, std::memory_order_release);
  return cudaSuccess;
}

// Memory of the device for a launcher's own use, until the stream is past its launches. Aligned to 16 bytes,
// uninitialised.
struct Allocator {
  void* (*allocate)(void* owner, int64_t bytes);
  void* owner;

  void* operator()(int64_t bytes) const { return allocate(owner, bytes); }
};

}  // namespace qlora::cuda
