// The forward, y = x · wᵀ + h · lora_bᵀ + bias with h = round(scaling · dropout(x) · lora_aᵀ): one launch for h where
// there is LoRA, and one for y.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Which kernel launch_linear_nf4 runs this problem with on `device`, and its parameters, in words.
cudaError_t linear_nf4_choice(const LinearProblem& problem, const Device& device, std::string* choice);

// On `device`, which is current. Waits for nothing, so that it can be captured in a graph. float32, bfloat16 and
// float16.
cudaError_t launch_linear_nf4(const LinearProblem& problem, const Device& device, const Allocator& allocate,
                              cudaStream_t stream);

}  // namespace qlora::cuda
