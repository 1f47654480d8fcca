// The forward, y = x · wᵀ + h · lora_bᵀ + bias with h = round(scaling · dropout(x) · lora_aᵀ): one launch for h where
// there is LoRA, and one for y.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cpp/format/problem.h"

namespace qlora::cuda {

// Bytes of device memory that launch_linear_nf4 wants for this problem on the current device. Looks at sizes and
// pointers' alignment, not at data.
cudaError_t linear_nf4_workspace_bytes(const LinearProblem& problem, int64_t* bytes);

// Which kernel launch_linear_nf4 runs this problem with on the current device, and its parameters, in words.
cudaError_t linear_nf4_choice(const LinearProblem& problem, std::string* choice);

// `workspace` is aligned to 16 bytes and needs no initialisation. Allocates nothing and waits for nothing, so that it
// can be captured in a graph. float32, bfloat16 and float16.
cudaError_t launch_linear_nf4(const LinearProblem& problem, void* workspace, cudaStream_t stream);

}  // namespace qlora::cuda
