// LoRA's low-rank products of all experts in one launch. They are those of launch_low_rank, but each expert has its own
// a: [e, rank, k] or, transposed, [e, k, rank].
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda {

// Unassigned rows become zeros. The kernel clears no tickets.
cudaError_t launch_grouped_low_rank(const Grouped<LowRankProblem>& problem, const Device& device, cudaStream_t stream);

}  // namespace qlora::cuda
