// The gradients of LoRA's weights, da = gᵀ · dropout(x) and db = dyᵀ · h, with h = round(scaling · dropout(x) ·
// lora_aᵀ) and g = round(scaling · dy · lora_b) recomputed: one launch for each of h and g, one for da and db.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cpp/format/problem.h"

namespace qlora::cuda {

// Bytes of device memory that launch_linear_nf4_dlora wants for this problem on the current device.
cudaError_t linear_nf4_dlora_workspace_bytes(const LoraGradProblem& problem, int64_t* bytes);

// Which kernel launch_linear_nf4_dlora runs this problem, of one token or more, with on the current device, and its
// parameters, in words.
cudaError_t linear_nf4_dlora_choice(const LoraGradProblem& problem, std::string* choice);

// `workspace` is aligned to 16 bytes and needs no initialisation. Allocates nothing and waits for nothing, so that it
// can be captured in a graph. Sums in float32 in a fixed order; float32 by float32 FMA, bfloat16 and float16 on tensor
// cores.
cudaError_t launch_linear_nf4_dlora(const LoraGradProblem& problem, void* workspace, cudaStream_t stream);

}  // namespace qlora::cuda
