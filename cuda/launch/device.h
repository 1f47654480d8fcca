// The attributes of the current device that tuning.h asks for, read once a device.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/tuning.h"

namespace qlora::cuda {

cudaError_t current_device(Device* device);

}  // namespace qlora::cuda
