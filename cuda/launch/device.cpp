// Queries the attributes of a device from the CUDA runtime.
#include "cuda/launch/device.h"

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/launch/sm100/launchers.h"
#include "cuda/launch/sm90/launchers.h"

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
  int integrated = 0;
  const struct {
    int* out;
    cudaDeviceAttr attribute;
  } rates[] = {
      // not every driver knows them
      {&device->clock_khz, cudaDevAttrClockRate},
      {&device->memory_clock_khz, cudaDevAttrMemoryClockRate},
      {&device->bus_bits, cudaDevAttrGlobalMemoryBusWidth},
      {&integrated, cudaDevAttrIntegrated},
  };
  for (const auto& r : rates) {
    if (cudaDeviceGetAttribute(r.out, r.attribute, index) == cudaSuccess) continue;
    cudaGetLastError();
    *r.out = 0;
  }
  device->is_integrated = integrated != 0;
  device->index = index;
  device->arch = 10 * major + minor;
  device->has_clusters = device->arch >= 90;
  if (device->arch == 90) device->resident_clusters = sm90::query_clusters(*device);
  if (device->arch / 10 == 10) device->resident_clusters = sm100::query_clusters(*device);
  return cudaSuccess;
}

struct Known {
  std::once_flag asked;
  Device device, without_clusters;
  std::atomic<bool> gave_up_clusters = false;
};
std::array<Known, kMaxDevices> g_known;

}  // namespace

cudaError_t device_at(int index, const Device** device) {
  if (index < 0 || index >= kMaxDevices) return cudaErrorInvalidDevice;
  Known& known = g_known[static_cast<size_t>(index)];
  cudaError_t error = cudaSuccess;
  std::call_once(known.asked, [&] {
    error = query(index, &known.device);
    known.without_clusters = known.device;
    known.without_clusters.has_clusters = false;
    known.without_clusters.resident_clusters = {known.device.resident_clusters[0]};
  });
  *device = known.gave_up_clusters.load(std::memory_order_acquire) ? &known.without_clusters : &known.device;
  return known.device.arch == 0 && error == cudaSuccess ? cudaErrorInvalidDevice : error;
}

void give_up_clusters() {
  int index = 0;
  if (cudaGetDevice(&index) == cudaSuccess && index < kMaxDevices)
    g_known[static_cast<size_t>(index)].gave_up_clusters.store(true, std::memory_order_release);
}

}  // namespace qlora::cuda
