// The GEMM on the decoded weights of all experts in one launch. A tile has one expert's tokens, and is a whole tile of
// linear_gemm_kernel, with the same bits. Panels hold the weights of one expert after another.
#pragma once

#include <cstdint>

#include "cuda/kernels/sm80/linear_gemm.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

// `stack` has the factors, the bias and the panel of the first expert, and all experts' tokens. Its units are one whole
// tile.
template <class T>
struct GroupedGemmArgs {
  GemmArgs<T> stack;
  tile::Groups groups;
};

// The arguments whose first token and column are the tile's.
template <class T, bool kRightHasRows>
__device__ __forceinline__ GemmArgs<T> tile_args(const GroupedGemmArgs<T>& p, const tile::GroupTile& tile,
                                                 int64_t column0) {
  GemmArgs<T> args = p.stack;
  const int64_t expert = tile.group.expert;
  const auto move = [&](GemmFactors<T>& to, int64_t columns) {
    to.left += tile.row0 * to.terms;
    to.right += expert * columns * to.terms + (kRightHasRows ? column0 : column0 * to.terms);
  };
  move(args.lora, args.out_stride);
  move(args.main, args.columns);
  if (args.bias != nullptr) args.bias += expert * args.out_stride + column0;
  args.out += tile.row0 * args.out_stride + column0;
  args.m = tile.group.end - tile.row0;
  args.columns -= column0;
  args.first_column += tile.row0 * args.out_stride + column0;
  return args;
}

// Grid: x over column tiles (fastest) and token tiles. Registers are scarce, so the tile's arguments are kept in shared
// memory.
template <class T, bool kRightHasRows>
__global__ void __launch_bounds__(tile::kGemmThreads, 1)
    grouped_linear_gemm_kernel(const __grid_constant__ GroupedGemmArgs<T> p) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  __shared__ __align__(alignof(GemmArgs<T>)) uint8_t shared_args[sizeof(GemmArgs<T>)];
  const auto column_tiles = static_cast<unsigned>(ceil_div(p.stack.columns, tile::kGemmColumns));
  const tile::GroupTile tile =
      tile::find_group_tile<tile::kGemmTokens>(p.groups, static_cast<int64_t>(blockIdx.x / column_tiles));
  if (!tile.exists) return;
  const int64_t column0 = int64_t{blockIdx.x % column_tiles} * tile::kGemmColumns;
  if (tile.group.expert == p.groups.count) {
    tile::store_zeros<T, tile::kGemmThreads>(p.stack.out, p.stack.out_stride, tile.row0,
                                             min(tile.row0 + tile::kGemmTokens, tile.group.end), column0,
                                             min(column0 + tile::kGemmColumns, p.stack.columns));
    return;
  }
  auto& args = reinterpret_cast<GemmArgs<T>&>(shared_args);
  if (threadIdx.x == 0) args = tile_args<T, kRightHasRows>(p, tile, column0);
  __syncthreads();
  compute_unit<T, kRightHasRows, false>(args, 0, ptx::shared_address(shared_memory));
}

}  // namespace qlora::kernels
