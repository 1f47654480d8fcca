// The launchers of the linear operators by exact products, and of the forward of ragged shapes. sm80/launchers.h
// describes their common interface.
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda::generic {

// For float32, and for bfloat16 and float16 of any shape.
cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context);
cudaError_t launch(const Grouped<LinearProblem>& problem, const Config& config, const Context& context);

cudaError_t plan_exact(const LinearDxProblem& p, const Device& device, Config* config);
cudaError_t launch_exact(const LinearDxProblem& p, const Config& config, const Context& context);
cudaError_t launch_exact(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context);

cudaError_t plan_exact(const LoraGradProblem& p, const Device& device, Config* config);
cudaError_t launch_exact(const LoraGradProblem& p, const Config& config, const Context& context);
cudaError_t launch_exact(const Grouped<LoraGradProblem>& problem, const Config& config, const Context& context);

// Writes the gradients of LoRA's weights, which have `rank` ranks in total, over zero tokens: zeros.
cudaError_t clear_gradients(const LoraGradProblem& p, int64_t rank, cudaStream_t stream);

}  // namespace qlora::cuda::generic
