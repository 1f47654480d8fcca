// The forward of all experts, each y = x · wᵀ + h · lora_bᵀ + bias with h = round(scaling · dropout(x) · lora_aᵀ) over
// rows of its own: one launch for h where there is LoRA, and one for y, whatever the number of experts. Rows of nobody
// become zeros.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cpp/format/grouped.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {

// Which kernel launch_grouped_linear_nf4 runs this problem with on `device`, and its parameters, in words.
cudaError_t grouped_linear_nf4_choice(const Grouped<LinearProblem>& problem, const Device& device, std::string* choice);

// On `device`, which is current. Reads the offsets on the device alone and waits for nothing, so that it can be
// captured in a graph and replayed with others. float32, bfloat16 and float16.
cudaError_t launch_grouped_linear_nf4(const Grouped<LinearProblem>& problem, const Device& device,
                                      const Allocator& allocate, cudaStream_t stream);

}  // namespace qlora::cuda
