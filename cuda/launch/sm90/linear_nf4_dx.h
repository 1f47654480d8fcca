// The gradient of x with Hopper's own instructions: one launch for g if there is LoRA, and one for dx.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Whether this is the fused kernel for the problem on `device`.
bool sm90_takes(const LinearDxProblem& problem, const Device& device);

// Its parameters, as text.
std::string linear_nf4_dx_sm90_choice(const LinearDxProblem& problem, const Device& device);

cudaError_t launch_linear_nf4_dx_sm90(const LinearDxProblem& problem, const Device& device, const Allocator& allocate,
                                      cudaStream_t stream);

}  // namespace qlora::cuda
