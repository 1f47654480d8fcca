// dX of all experts in one launch. It uses the tiles of linear_nf4_dx_kernel, and each tile has one expert's tokens and
// weight. Tokens keep their row numbers in dy, as in grouped_linear_nf4_kernel.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/grouped_linear_nf4_dx_exact.cuh"
#include "cuda/kernels/sm80/linear_nf4_dx.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

template <class T, int kTokenTiles, bool kRagged, bool kHasOffsets>
__global__ void __launch_bounds__(tile::kDxThreads, dx_ctas_per_sm(kTokenTiles, kRagged))
    grouped_linear_nf4_dx_kernel(const __grid_constant__ GroupedDxArgs p) {
  visit_dx_tile<T, 8 * kTokenTiles, tile::kDxColumns, tile::kDxThreads>(
      p, [](const DxArgs& args, int64_t token0, int64_t column0) {
        if constexpr (tile::DxLayout<kTokenTiles, kRagged, kHasOffsets>::kBytes <= tile::kMostSharedBytes)
          linear_nf4_dx_tile<T, kTokenTiles, kRagged, kHasOffsets>(args, token0, column0);
      });
}

}  // namespace qlora::kernels
