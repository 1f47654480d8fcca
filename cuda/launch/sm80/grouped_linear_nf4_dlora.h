// The gradients of all experts' LoRA, each da = gᵀ · dropout(x) and db = dyᵀ · h over its own rows, with h and g
// recomputed: one launch for each of h and g, one for da and db, whatever the number of experts.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// The kernel that launch_grouped_linear_nf4_dlora runs for this problem on `device`, and its parameters, as text.
cudaError_t grouped_linear_nf4_dlora_choice(const Grouped<LoraGradProblem>& problem, const Device& device,
                                            std::string* choice);

// Like launch_grouped_linear_nf4.
cudaError_t launch_grouped_linear_nf4_dlora(const Grouped<LoraGradProblem>& problem, const Device& device,
                                            const Allocator& allocate, cudaStream_t stream);

}  // namespace qlora::cuda
