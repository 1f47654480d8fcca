// dX of all experts, each dx = dy · w + mask ∘ (g · lora_a) · keep_scale with g = round(scaling · dy · lora_b) over
// rows of its own: one launch for g where there is LoRA, and one for dx, whatever the number of experts. Rows of nobody
// become zeros.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Which kernel launch_grouped_linear_nf4_dx runs this problem with on `device`, and its parameters, in words.
cudaError_t grouped_linear_nf4_dx_choice(const Grouped<LinearDxProblem>& problem, const Device& device,
                                         std::string* choice);

// As launch_grouped_linear_nf4.
cudaError_t launch_grouped_linear_nf4_dx(const Grouped<LinearDxProblem>& problem, const Device& device,
                                         const Allocator& allocate, cudaStream_t stream);

}  // namespace qlora::cuda
