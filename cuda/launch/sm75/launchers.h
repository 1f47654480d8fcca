// The launcher of the forward on the tensor cores of a T4. sm80/launchers.h describes its interface.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::sm75 {

cudaError_t plan(const LinearProblem& p, const Device& device, Config* config);
cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context);

}  // namespace qlora::cuda::sm75
