// Kernel launches that report only their own errors, and the occupancy of kernels on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "cuda/launch/device.h"

namespace qlora::cuda {

// Returns the launch's own error. cudaGetLastError after <<<>>> could also return an error of an earlier call by other
// code.
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

// The number of CTAs of kKernel that an SM of the device holds at once, at least 1. It is queried once per device. The
// first call also allows the kernel `shared_bytes` of dynamic shared memory, so it must come before the first launch.
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

// What a launcher needs: the device, which is current, torch's stream on it, and the resources that torch provides.
struct Context {
  const Device& device;
  cudaStream_t stream;
  void* owner;
  void* (*allocate_from)(void* owner, int64_t bytes);
  void* (*blas_of)(void* owner);

  // Allocates the workspace of a call: aligned to 16 bytes, uninitialized, valid until the stream has finished the
  // launches. Call at most once per call of the operator.
  uint8_t* allocate(int64_t bytes) const { return static_cast<uint8_t*>(allocate_from(owner, bytes)); }
  // Returns torch's cuBLAS handle for the device and stream. torch creates it on first use.
  void* blas() const { return blas_of(owner); }
};

}  // namespace qlora::cuda
