// dX of all experts, each dx = dy · w + mask ∘ (g · lora_a) · keep_scale with g = round(scaling · dy · lora_b) over
// its own rows: one launch for g if there is LoRA, and one for dx, whatever the number of experts. Unassigned rows
// become zeros.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// The kernel that launch_grouped_linear_nf4_dx runs for this problem on `device`, and its parameters, as text.
cudaError_t grouped_linear_nf4_dx_choice(const Grouped<LinearDxProblem>& problem, const Device& device,
                                         std::string* choice);

// Like launch_grouped_linear_nf4.
cudaError_t launch_grouped_linear_nf4_dx(const Grouped<LinearDxProblem>& problem, const Device& device,
                                         const Allocator& allocate, cudaStream_t stream);

}  // namespace qlora::cuda
