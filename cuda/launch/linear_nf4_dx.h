// The gradient of x, dx = dy · w + mask ∘ (g · lora_a) · keep_scale with g = round(scaling · dy · lora_b): one launch
// for g where there is LoRA, and one for dx.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Which kernel launch_linear_nf4_dx runs this problem with on `device`, and its parameters, in words.
cudaError_t linear_nf4_dx_choice(const LinearDxProblem& problem, const Device& device, std::string* choice);

// On `device`, which is current. Waits for nothing, so that it can be captured in a graph. bfloat16 and float16 run on
// tensor cores, with float32 sums; float32 by float32 FMA.
cudaError_t launch_linear_nf4_dx(const LinearDxProblem& problem, const Device& device, const Allocator& allocate,
                                 cudaStream_t stream);

}  // namespace qlora::cuda
