// The forward, y = x · wᵀ + h · lora_bᵀ + bias with h = round(scaling · dropout(x) · lora_aᵀ): one launch for h if
// there is LoRA, and one for y.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// The kernel that launch_linear_nf4 runs for this problem on `device`, and its parameters, as text.
cudaError_t linear_nf4_choice(const LinearProblem& problem, const Device& device, std::string* choice);

// Launches on `device`, the current one, for float32, bfloat16 and float16. The host never waits, so a graph can
// capture it.
cudaError_t launch_linear_nf4(const LinearProblem& problem, const Device& device, const Allocator& allocate,
                              cudaStream_t stream);

}  // namespace qlora::cuda
