// The gradients of LoRA's weights, da = gᵀ · dropout(x) and db = dyᵀ · h, with h = round(scaling · dropout(x) ·
// lora_aᵀ) and g = round(scaling · dy · lora_b) recomputed: one launch for each of h and g, one for da and db.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Which kernel launch_linear_nf4_dlora runs this problem, of one token or more, with on `device`, and its parameters,
// in words.
cudaError_t linear_nf4_dlora_choice(const LoraGradProblem& problem, const Device& device, std::string* choice);

// On `device`, which is current. Waits for nothing, so that it can be captured in a graph. Sums in float32 in a fixed
// order; float32 by float32 FMA, bfloat16 and float16 on tensor cores.
cudaError_t launch_linear_nf4_dlora(const LoraGradProblem& problem, const Device& device, const Allocator& allocate,
                                    cudaStream_t stream);

}  // namespace qlora::cuda
