// The tile of a CTA, and of a lane, in the tensor-core dX kernel.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/linear_nf4_dx_args.cuh"
#include "cuda/tile/sm80/dx_layout.cuh"

namespace qlora::kernels {

struct DxTile {
  int64_t token0, column0, row0;  // the CTA's first token, column and row
  int64_t column;                 // the first of this lane's eight columns
  int rows, stages;               // the CTA's share of W's rows, and its number of stages
  int group, slab, lane, g, t;
};

// Makes split blockIdx.y of the tile of tokens token0.. and columns column0...
__device__ __forceinline__ DxTile make_dx_tile(const DxArgs& args, int64_t token0, int64_t column0) {
  DxTile tile;
  const int warp = threadIdx.x / 32;
  tile.lane = threadIdx.x % 32;
  tile.g = tile.lane / 4;
  tile.t = tile.lane % 4;
  tile.slab = warp % tile::kDxSlabs;
  tile.group = warp / tile::kDxSlabs;
  tile.token0 = token0;
  tile.column0 = column0;
  tile.column = tile.column0 + tile.slab * tile::kDxSlabColumns + 8 * tile.g;
  tile.row0 = blockIdx.y * args.rows_per_split;
  tile.rows = static_cast<int>(min(args.rows_per_split, args.n - tile.row0));
  tile.stages = (tile.rows + tile::kDxStageRows - 1) / tile::kDxStageRows;
  return tile;
}

}  // namespace qlora::kernels
