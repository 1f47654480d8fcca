// The forward and dX of many tokens: decodes the weight panel by panel, and cuBLAS multiplies with each panel. A panel
// is a range of the output's columns and holds their complete sums. If LoRA or bias are added, the sums are float32,
// and only the total is rounded. On B200, they are further terms of the sums instead (cuda/tuning/library.h).
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::library {

// These throw std::runtime_error with cuBLAS's message if it fails.
cudaError_t launch(const LinearProblem& problem, const Config& config, const Context& context);
cudaError_t launch(const LinearDxProblem& problem, const Config& config, const Context& context);

}  // namespace qlora::cuda::library
