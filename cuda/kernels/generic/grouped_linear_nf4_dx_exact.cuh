// dX of all experts in one launch: what all data types share, and the kernel of exact products. Each tile has one
// expert's tokens and weight. Tokens keep their row numbers in dy, as in grouped_linear_nf4_ragged_kernel.
#pragma once

#include <cstdint>

#include "cpp/format/grouped.h"
#include "cuda/kernels/generic/linear_nf4_dx_exact.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

struct GroupedDxArgs {
  DxArgs stack;  // of the first expert, with all experts' tokens; token_tiles is an upper bound
  tile::Groups groups;
  WeightStride stride;
};

// `bytes` is the size of an element.
__device__ __forceinline__ DxArgs expert_args(const GroupedDxArgs& p, const tile::Group& group, int bytes) {
  DxArgs args = p.stack;
  args.packed += group.expert * p.stride.packed_bytes;
  args.scales.scales = expert_scales(args.scales.scales, p.stride, group.expert);
  args.lora_a = static_cast<const char*>(args.lora_a) + group.expert * args.rank * args.k * bytes;
  args.m = group.end;
  args.splits = 1;
  return args;
}

// Calls body(args, token0, column0) for this CTA's tile of an expert, kTokens x kColumns. Grid: x over token tiles
// (fastest) and column tiles.
template <class T, int kTokens, int kColumns, int kThreads, class Body>
__device__ __forceinline__ void visit_dx_tile(const GroupedDxArgs& p, Body body) {
  ptx::start_next_grid();
  const tile::GroupTile tile =
      tile::find_group_tile<kTokens>(p.groups, static_cast<int64_t>(blockIdx.x % p.stack.token_tiles));
  if (!tile.exists) return;
  const int64_t column0 = int64_t{blockIdx.x / p.stack.token_tiles} * kColumns;
  if (tile.group.expert == p.groups.count) {
    ptx::wait_for_previous_grid();  // so this grid ends after the previous one
    tile::store_zeros<T, kThreads>(static_cast<T*>(p.stack.dx), p.stack.k, tile.row0,
                                   min(tile.row0 + kTokens, tile.group.end), column0, column0 + kColumns);
  } else {
    body(expert_args(p, tile.group, sizeof(T)), tile.row0, column0);
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kDxExactThreads, 2)
    grouped_linear_nf4_dx_exact_kernel(const __grid_constant__ GroupedDxArgs p) {
  visit_dx_tile<T, kDxExactTokens, kDxExactColumns, kDxExactThreads>(
      p, [](const DxArgs& args, int64_t token0, int64_t column0) {
        linear_nf4_dx_exact_tile<T, kWide>(args, token0, column0);
      });
}

}  // namespace qlora::kernels
