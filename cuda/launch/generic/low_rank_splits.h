// How launch_low_rank (low_rank.h) splits its sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "cpp/format/dtypes.h"
#include "cuda/tuning/device.h"

namespace qlora::cuda {

// Finds how many CTAs divide k in launch_low_rank's products of 16-bit types on tensor cores. `of_16` is their number
// for up to 16 ranks, of_more[0] for up to 64, of_more[1] for up to 128, and so on.
cudaError_t query_low_rank_splits(DType dtype, int64_t m, int64_t k, bool transposed, const Device& device,
                                  uint8_t* of_16, std::span<uint8_t> of_more);

}  // namespace qlora::cuda
