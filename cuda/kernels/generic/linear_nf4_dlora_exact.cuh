// LoRA's weight gradients for float32, and for float16 on devices without the tensor cores' kernels: every product is a
// float32 FMA, for any shape. Like linear_nf4_dlora_kernel, but a thread has two neighbouring columns and 16 ranks, and
// a warp takes every eighth token.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/linear_nf4_dlora_parts.cuh"
#include "cuda/ptx/grid_dependency.cuh"

namespace qlora::kernels {

// Sums over tokens [begin, end) for column tile `column_tile` and the ranks of blockIdx.y. This is the work of a whole
// CTA.
template <class T>
__device__ __forceinline__ void linear_nf4_dlora_exact_tile(const DLoraArgs& args, int64_t column_tile, int64_t begin,
                                                            int64_t end) {
  __shared__ DLoraSums sums;
  const DLoraTile tile = make_dlora_tile<kDLoraRanks>(args, column_tile);
  const int group = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = tile.column0 + 2 * lane;
  const int ranks = static_cast<int>(min(args.rank - tile.rank0, int64_t{kDLoraRanks}));

  float acc[2][kDLoraRanks] = {};
#pragma unroll 2
  for (int64_t m = begin + group; m < end; m += kDLoraGroups) {
    const int64_t index = m * tile.side.columns + column;
    const T* wide = static_cast<const T*>(tile.side.wide) + index;
    const uint32_t keep = tile.side.masked ? tile::keep_mask(args.dropout, index) : 3u;
    const float w0 = column < tile.side.columns && keep & 1 ? tile::widen(wide[0]) : 0.0f;
    const float w1 = column + 1 < tile.side.columns && keep & 2 ? tile::widen(wide[1]) : 0.0f;
    const T* low_rank = static_cast<const T*>(tile.side.low_rank) + m * args.rank + tile.rank0;
#pragma unroll
    for (int r = 0; r < kDLoraRanks; ++r) {
      const float p = r < ranks ? tile::widen(low_rank[r]) : 0.0f;
      acc[0][r] = fmaf(w0, p, acc[0][r]);
      acc[1][r] = fmaf(w1, p, acc[1][r]);
    }
  }

#pragma unroll
  for (int r = 0; r < kDLoraRanks; ++r) {
    sums.value[group][r][2 * lane] = acc[0][r];
    sums.value[group][r][2 * lane + 1] = acc[1][r];
  }
  __syncthreads();
  finish_dlora<T>(args, tile, sums, 0, 1);
  if (args.splits > 1) add_dlora_splits<T>(args, tile, 1);
}

// Grid: x = column tile, y = ranks, z = split.
template <class T>
__global__ void __launch_bounds__(kDLoraThreads) linear_nf4_dlora_exact_kernel(const DLoraArgs args) {
  ptx::wait_for_previous_grid();
  linear_nf4_dlora_exact_tile<T>(args, blockIdx.x, blockIdx.z * args.tokens_per_split,
                                 min(args.m, (blockIdx.z + 1) * args.tokens_per_split));
}

}  // namespace qlora::kernels
