// Queries the attributes of a device from the CUDA runtime.
#include "cuda/launch/device.h"

#include <array>
#include <mutex>

namespace qlora::cuda {
namespace {

cudaError_t query(int index, Device* device) {
  int major = 0, minor = 0;
  const struct {
    int* out;
    cudaDeviceAttr attribute;
  } wanted[] = {
      {&device->sm_count, cudaDevAttrMultiProcessorCount},
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&device->shared_per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&device->l2_bytes, cudaDevAttrL2CacheSize},
  };
  for (const auto& w : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(w.out, w.attribute, index); error != cudaSuccess) return error;
  }
  device->index = index;
  device->arch = 10 * major + minor;
  return cudaSuccess;
}

}  // namespace

cudaError_t device_at(int index, const Device** device) {
  static std::array<Device, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> asked;
  if (index < 0 || index >= kMaxDevices) return cudaErrorInvalidDevice;
  const auto i = static_cast<size_t>(index);
  cudaError_t error = cudaSuccess;
  std::call_once(asked[i], [&] { error = query(index, &known[i]); });
  *device = &known[i];
  return known[i].arch == 0 && error == cudaSuccess ? cudaErrorInvalidDevice : error;
}

}  // namespace qlora::cuda
