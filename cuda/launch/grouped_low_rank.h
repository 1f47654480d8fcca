// LoRA's low-rank products of all experts, one launch whatever their number: launch_low_rank's, with each expert's own
// a, [e, rank, k] or transposed [e, k, rank].
#pragma once

#include <cuda_runtime_api.h>

#include "cpp/format/grouped.h"
#include "cuda/launch/low_rank.h"

namespace qlora::cuda {

// Rows of nobody are zeros, and nothing is cleared.
cudaError_t launch_grouped_low_rank(const Grouped<LowRankProblem>& problem, cudaStream_t stream);

}  // namespace qlora::cuda
