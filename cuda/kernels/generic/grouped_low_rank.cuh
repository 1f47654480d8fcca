// LoRA's low-rank products of all experts: like low_rank_kernel, but each expert has its own a. out is [rows, rank],
// and rows that belong to no expert become zeros.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/low_rank.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

template <class T>
struct GroupedLowRankArgs {
  LowRankArgs<T> stack;  // of the first expert; x and out have all rows, `clear` is unused
  tile::Groups groups;
};

// The arguments for the tokens of `group`. Rows keep their numbers, because the dropout mask depends on them.
template <class T>
__device__ __forceinline__ LowRankArgs<T> expert_args(const GroupedLowRankArgs<T>& p, const tile::Group& group) {
  LowRankArgs<T> args = p.stack;
  args.a += group.expert * args.k * args.rank;
  args.m = group.end;
  return args;
}

// Grid: x over tiles of 8·kTokenTiles tokens of one expert, up to the largest possible number of tiles, y over
// 16·kRankTiles ranks. Has the requirements of low_rank_tile, for every expert.
template <class T, bool kTransposed, int kRankTiles, int kTokenTiles>
__global__ void __launch_bounds__(kLowRankThreads)
    grouped_low_rank_kernel(const __grid_constant__ GroupedLowRankArgs<T> p) {
  ptx::start_next_grid();
  constexpr int kTokens = 8 * kTokenTiles;
  const tile::GroupTile tile = tile::find_group_tile<kTokens>(p.groups, blockIdx.x);
  if (!tile.exists) return;
  const int64_t rank0 = int64_t{blockIdx.y} * (16 * kRankTiles);
  if (tile.group.expert == p.groups.count) {
    const int64_t row_end = tile.row0 + kTokens < p.groups.rows ? tile.row0 + kTokens : p.groups.rows;
    return tile::store_zeros<T, kLowRankThreads>(p.stack.out, p.stack.rank, tile.row0, row_end, rank0,
                                                 rank0 + 16 * kRankTiles);
  }
  // With one tile of each, low_rank_kernel loads 4 pieces at a time. Here an expert's arguments take registers, too.
  constexpr int kTurns = kRankTiles * kTokenTiles > 1 ? 1 : 2;
  if constexpr (tile::kFewRegisters && kTurns == 1) {  // in shared memory
    using Args = LowRankArgs<T>;
    __shared__ __align__(alignof(Args)) uint8_t args[sizeof(Args)];
    if (threadIdx.x == 0) *reinterpret_cast<Args*>(args) = expert_args(p, tile.group);
    __syncthreads();
    low_rank_tile<T, kTransposed, kRankTiles, kTokenTiles, kTurns>(*reinterpret_cast<const Args*>(args), tile.row0,
                                                                   rank0);
  } else {
    low_rank_tile<T, kTransposed, kRankTiles, kTokenTiles, kTurns>(expert_args(p, tile.group), tile.row0, rank0);
  }
}

// Grid: x over tokens, y over 4·kLowRankScalarRanks ranks. To fit more than 8 CTAs, ptxas would spill registers.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kLowRankScalarThreads, 8)
    grouped_low_rank_scalar_kernel(const __grid_constant__ GroupedLowRankArgs<T> p) {
  ptx::start_next_grid();
  for (int64_t token = blockIdx.x; token < p.groups.rows; token += gridDim.x) {
    const tile::GroupTile tile = tile::find_group_tile<1>(p.groups, token);
    if (tile.group.expert == p.groups.count) {
      constexpr int64_t kRanks = kLowRankScalarThreads / 32 * kLowRankScalarRanks;
      tile::store_zeros<T, kLowRankScalarThreads>(p.stack.out, p.stack.rank, token, token + 1, blockIdx.y * kRanks,
                                                  (blockIdx.y + 1) * kRanks);
    } else {
      low_rank_token<T, kTransposed>(expert_args(p, tile.group), token);
    }
  }
}

}  // namespace qlora::kernels
