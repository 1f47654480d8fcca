// The forward of all experts, each y = x · wᵀ + h · lora_bᵀ + bias with h = round(scaling · dropout(x) · lora_aᵀ) over
// its own rows: one launch for h if there is LoRA, and one for y, whatever the number of experts. Unassigned rows
// become zeros.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// The kernel that launch_grouped_linear_nf4 runs for this problem on `device`, and its parameters, as text.
cudaError_t grouped_linear_nf4_choice(const Grouped<LinearProblem>& problem, const Device& device, std::string* choice);

// Launches on `device`, the current one, for float32, bfloat16 and float16. Only the device reads the offsets and the
// host never waits, so a graph can capture it and replay it with other offsets.
cudaError_t launch_grouped_linear_nf4(const Grouped<LinearProblem>& problem, const Device& device,
                                      const Allocator& allocate, cudaStream_t stream);

}  // namespace qlora::cuda
