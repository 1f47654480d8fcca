// The forward of all experts in one launch. It uses the tiles of linear_nf4_kernel, and each tile has one expert's
// tokens and weight. Tokens keep their row numbers in x: an expert's arguments cover all tokens up to its last, and its
// tiles begin at its first. Weights of experts without tokens are never read.
#pragma once

#include <cstdint>

#include "cpp/format/grouped.h"
#include "cuda/kernels/generic/grouped_linear_nf4_ragged.cuh"
#include "cuda/kernels/sm80/linear_nf4.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

template <class T>
__device__ __forceinline__ LinearArgs<T> expert_args(const GroupedLinearArgs<LinearArgs<T>>& p,
                                                     const tile::Group& group) {
  LinearArgs<T> args = p.stack;
  args.packed += group.expert * p.stride.packed_bytes;
  args.scales.scales = expert_scales(args.scales.scales, p.stride, group.expert);
  args.m = args.lora.m = group.end;
  args.lora.b += group.expert * args.n * args.lora.rank;
  if (args.out.bias != nullptr) args.out.bias += group.expert * args.n;
  return args;
}

// Grid: x over token tiles (fastest) and row tiles. Has the requirements of linear_nf4_tile, for every expert.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    grouped_linear_nf4_kernel(const __grid_constant__ GroupedLinearArgs<LinearArgs<typename Tile::T>> p) {
  const tile::GroupTile tile =
      tile::find_group_tile<Tile::kTokens>(p.groups, static_cast<int64_t>(blockIdx.x % p.stack.token_tiles));
  if (!tile.exists) return;
  const int64_t n0 = blockIdx.x / p.stack.token_tiles * Tile::kRows;
  if (tile.group.expert == p.groups.count) {
    ptx::wait_for_previous_grid();  // so this grid ends after the previous one
    tile::store_zeros<typename Tile::T, Tile::kThreads>(
        p.stack.out.y, p.stack.n, tile.row0, min(tile.row0 + Tile::kTokens, tile.group.end), n0, n0 + Tile::kRows);
    return;
  }
  if constexpr (Tile::kSharedBytes <= tile::kMostSharedBytes)
    linear_nf4_tile<Tile, false>(expert_args(p, tile.group), n0, tile.row0,
                                 tile::SplitSlice(p.stack.k, p.stack.segments_per_split));
}

}  // namespace qlora::kernels
