// The gradient of x, dx = dy · w + mask ∘ (g · lora_a) · keep_scale with g = round(scaling · dy · lora_b): one launch
// for g where there is LoRA, and one for dx.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cpp/format/problem.h"

namespace qlora::cuda {

// Bytes of device memory that launch_linear_nf4_dx wants for this problem on the current device. Looks at sizes and
// pointers' alignment, not at data.
cudaError_t linear_nf4_dx_workspace_bytes(const LinearDxProblem& problem, int64_t* bytes);

// Which kernel launch_linear_nf4_dx runs this problem with on the current device, and its parameters, in words.
cudaError_t linear_nf4_dx_choice(const LinearDxProblem& problem, std::string* choice);

// `workspace` is aligned to 16 bytes and needs no initialisation. Allocates nothing and waits for nothing, so that it
// can be captured in a graph. bfloat16 and float16 run on tensor cores, with float32 sums; float32 by float32 FMA.
cudaError_t launch_linear_nf4_dx(const LinearDxProblem& problem, void* workspace, cudaStream_t stream);

}  // namespace qlora::cuda
