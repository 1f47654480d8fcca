// The attributes of a device that cuda/tuning needs. They are read once per device.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/tuning/device.h"

namespace qlora::cuda {

inline constexpr int kMaxDevices = 128;

// `*device` lives as long as the process. Returns cudaErrorInvalidDevice for devices beyond kMaxDevices.
cudaError_t device_at(int index, const Device** device);

// Makes device_at describe the current device as one without clusters from now on, because the driver refuses them.
void give_up_clusters();

}  // namespace qlora::cuda
