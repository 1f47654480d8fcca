// The gradients of all experts' LoRA weights in one launch. It uses the tiles of linear_nf4_dlora_kernel, and each tile
// sums over one expert's tokens. An expert without tokens gets zeros.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/grouped_linear_nf4_dlora_exact.cuh"
#include "cuda/kernels/sm80/linear_nf4_dlora.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

template <class T, int kRankTiles, bool kRagged>
__global__ void __launch_bounds__(kDLoraThreads)
    grouped_linear_nf4_dlora_kernel(const __grid_constant__ GroupedDLoraArgs p) {
  visit_dlora_tile<T>(p, [](const DLoraArgs& args, int64_t column_tile, int64_t begin, int64_t end) {
    linear_nf4_dlora_tile<T, kRankTiles, kRagged>(args, column_tile, begin, end);
  });
}

}  // namespace qlora::kernels
