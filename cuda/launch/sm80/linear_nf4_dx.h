// The gradient of x, dx = dy · w + mask ∘ (g · lora_a) · keep_scale with g = round(scaling · dy · lora_b): one launch
// for g if there is LoRA, and one for dx.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// The kernel that launch_linear_nf4_dx runs for this problem on `device`, and its parameters, as text.
cudaError_t linear_nf4_dx_choice(const LinearDxProblem& problem, const Device& device, std::string* choice);

// Launches on `device`, the current one. The host never waits, so a graph can capture it. bfloat16 and float16 use
// tensor cores with float32 sums, float32 uses float32 FMA.
cudaError_t launch_linear_nf4_dx(const LinearDxProblem& problem, const Device& device, const Allocator& allocate,
                                 cudaStream_t stream);

}  // namespace qlora::cuda
