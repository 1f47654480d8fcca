// The forward of all experts in one launch, for any shape and type. It uses the tiles of linear_nf4_ragged_kernel, and
// each tile has one expert's tokens and weight. Tokens keep their row numbers in x: an expert's arguments cover all
// tokens up to its last, and its tiles begin at its first. Weights of experts without tokens are never read.
#pragma once

#include <cstdint>

#include "cpp/format/grouped.h"
#include "cuda/kernels/generic/linear_nf4_ragged.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

// Args: LinearArgs or RaggedLinearArgs of the first expert, with all experts' tokens. token_tiles is an upper bound.
template <class Args>
struct GroupedLinearArgs {
  Args stack;
  tile::Groups groups;
  WeightStride stride;
};

template <class T>
__device__ __forceinline__ RaggedLinearArgs<T> expert_args(const GroupedLinearArgs<RaggedLinearArgs<T>>& p,
                                                           const tile::Group& group) {
  RaggedLinearArgs<T> args = p.stack;
  args.packed += group.expert * p.stride.packed_bytes;
  args.scales.scales = expert_scales(args.scales.scales, p.stride, group.expert);
  args.m = group.end;
  args.lora_b += group.expert * args.n * args.rank;
  if (args.bias != nullptr) args.bias += group.expert * args.n;
  return args;
}

// Grid: x over token tiles (fastest) and row tiles.
template <class T, int kTokens, bool kWide>
__global__ void __launch_bounds__(kRaggedThreads)
    grouped_linear_nf4_ragged_kernel(const __grid_constant__ GroupedLinearArgs<RaggedLinearArgs<T>> p) {
  const tile::GroupTile tile =
      tile::find_group_tile<kTokens>(p.groups, static_cast<int64_t>(blockIdx.x % p.stack.token_tiles));
  if (!tile.exists) return;
  const int64_t n0 = blockIdx.x / p.stack.token_tiles * kRaggedRows;
  if (tile.group.expert == p.groups.count) {
    ptx::wait_for_previous_grid();  // so this grid ends after the previous one
    tile::store_zeros<T, kRaggedThreads>(p.stack.y, p.stack.n, tile.row0, min(tile.row0 + kTokens, tile.group.end), n0,
                                         n0 + kRaggedRows);
    return;
  }
  linear_nf4_ragged_tile<T, kTokens, kWide>(expert_args(p, tile.group), n0, tile.row0);
}

}  // namespace qlora::kernels
