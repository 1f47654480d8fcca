// The forward and dX on wgmma and TMA, as sm80/launchers.h describes them. Their configurations are complete without a
// plan: an SM holds one CTA, by design.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::sm90 {

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context);
cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context);

}  // namespace qlora::cuda::sm90
