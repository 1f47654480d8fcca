// The forward with Hopper's own instructions: one launch for h if there is LoRA, and one for y.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Whether this is the fused kernel for the problem on `device`.
bool sm90_takes(const LinearProblem& problem, const Device& device);

// Its parameters, as text.
std::string linear_nf4_sm90_choice(const LinearProblem& problem, const Device& device);

cudaError_t launch_linear_nf4_sm90(const LinearProblem& problem, const Device& device, const Allocator& allocate,
                                   cudaStream_t stream);

}  // namespace qlora::cuda
