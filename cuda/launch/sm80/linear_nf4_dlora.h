// The gradients of LoRA's weights, da = gᵀ · dropout(x) and db = dyᵀ · h, with h = round(scaling · dropout(x) ·
// lora_aᵀ) and g = round(scaling · dy · lora_b) recomputed: one launch for each of h and g, one for da and db.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/problem.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// The kernel that launch_linear_nf4_dlora runs for this problem, of one or more tokens, on `device`, and its
// parameters, as text.
cudaError_t linear_nf4_dlora_choice(const LoraGradProblem& problem, const Device& device, std::string* choice);

// Launches on `device`, the current one. The host never waits, so a graph can capture it. Sums are float32, in a fixed
// order. float32 uses float32 FMA, bfloat16 and float16 use tensor cores.
cudaError_t launch_linear_nf4_dlora(const LoraGradProblem& problem, const Device& device, const Allocator& allocate,
                                    cudaStream_t stream);

}  // namespace qlora::cuda
