#include "cuda/launch/device.h"

#include <map>
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
      {&device->shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
  };
  for (const auto& w : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(w.out, w.attribute, index); error != cudaSuccess) return error;
  }
  device->arch = 10 * major + minor;
  return cudaSuccess;
}

}  // namespace

cudaError_t current_device(Device* device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) {
    Device fresh;
    if (const cudaError_t error = query(index, &fresh); error != cudaSuccess) return error;
    found = known.emplace(index, fresh).first;
  }
  *device = found->second;
  return cudaSuccess;
}

}  // namespace qlora::cuda
