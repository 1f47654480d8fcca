// dx = dy · w + mask ∘ (g · a) · keep_scale on tensor cores, straight from the packed weight.
//
// A CTA computes dx[tokens of its tile][256 columns] over its share of the rows n. Its eight warps divide four slabs of
// 64 columns. The two warps of a slab take turns at steps of 16 rows, and add their sums through shared memory at the
// end. W is the mma's A operand, and the mma sums over rows n:
//
//   W in 64 columns x 16 rows: lane (g = lane / 4, t = lane % 4) holds 8 columns 8g..8g+7 (4 bytes) of rows 4t..4t+3.
//   Two rows' nibbles of one column are joined into a byte, which the pair table turns into (w[n][c], w[n+1][c]).
//   mma i of four: its row g is column 8g + 2i, its row g + 8 column 8g + 2i + 1; its k = {2t, 2t+1, 2t+8, 2t+9} are
//   rows n = 4t..4t+3, for which dy's fragment is 8 consecutive bytes of a token.
//
// So acc[i][j][e] and acc[i][j][2 + e] are columns 8g + 2i and 8g + 2i + 1 of token 8j + 2t + e: a lane ends up with 8
// consecutive outputs of a token, which it stores as 16 bytes. LoRA is the same product with [g | a] in place of [dy |
// w].
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/sm80/linear_nf4_dx_accumulators.cuh"
#include "cuda/kernels/sm80/linear_nf4_dx_loader.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/tile/generic/arch_limits.cuh"

namespace qlora::kernels {

// The ragged kernel takes weights with and without offsets, the others only those that they are compiled for.
//
// Computes the tile of tokens token0.. and columns column0.. over split blockIdx.y of the rows. This is the work of a
// whole CTA.
template <class T, int kTokenTiles, bool kRagged, bool kHasOffsets>
__device__ __forceinline__ void linear_nf4_dx_tile(const DxArgs& args, int64_t token0, int64_t column0) {
  using Layout = tile::DxLayout<kTokenTiles, kRagged, kHasOffsets>;
  constexpr int kAhead = Layout::kStages - 1;
  extern __shared__ __align__(256) char shared[];
  const DxTile tile = make_dx_tile(args, token0, column0);
  std::conditional_t<kRagged, DxRaggedLoader<T, kTokenTiles>, DxLoader<T, kTokenTiles, kHasOffsets>> loader(args, tile,
                                                                                                            shared);

  for (int stage = 0; stage < kAhead; ++stage) {
    if (stage < tile.stages) loader.start_copies(stage);
    ptx::cp_async_commit();
  }
  tile::fill_pairs_f32<tile::kDxThreads>(shared, args.code);
  tile::fill_scale_values<tile::kDxThreads>(args.scales, reinterpret_cast<float*>(shared + Layout::kScaleValues));
  __syncthreads();
  for (int stage = 0; stage < kAhead && stage < tile.stages; ++stage) {
    loader.load_scales();
    loader.store_scales(stage);
  }

  ptx::wait_for_previous_grid();  // which computes g, and clears the tickets
  DxAccumulators<T, kTokenTiles> acc;
  const bool has_columns = tile.column0 + tile.slab * tile::kDxSlabColumns < args.k;  // otherwise this warp only copies
  acc.template add_lora<kRagged>(args, tile, has_columns && blockIdx.y == 0 && tile.group == 0 ? args.rank : 0);

  const bool fused = kHasOffsets && tile::fuses_offset(args.scales);
  for (int stage = 0, slot = 0, free = kAhead; stage < tile.stages; ++stage) {
    ptx::cp_async_wait<kAhead - 1>();
    __syncthreads();  // the stage is complete, and `free` is no longer being read
    const bool more = stage + kAhead < tile.stages;
    if (more) {
      loader.start_copies(free);
      loader.load_scales();
    }
    ptx::cp_async_commit();
    if (has_columns) acc.template add_stage<kRagged, kHasOffsets>(args, tile, shared, stage, slot, fused);
    if (more) loader.store_scales(free);
    slot = slot + 1 == Layout::kStages ? 0 : slot + 1;
    free = free + 1 == Layout::kStages ? 0 : free + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  acc.template finish<kRagged>(args, tile, shared);
}

// ptxas would spill registers to fit two CTAs of a ragged shape.
constexpr int dx_ctas_per_sm(int token_tiles, bool ragged) { return token_tiles <= 2 && !ragged ? 2 : 1; }

// Grid: x = column tile * token_tiles + token tile, so neighbouring CTAs share W in the cache; y = split.
template <class T, int kTokenTiles, bool kRagged, bool kHasOffsets>
__global__ void __launch_bounds__(tile::kDxThreads, dx_ctas_per_sm(kTokenTiles, kRagged))
    linear_nf4_dx_kernel(const DxArgs args) {
  ptx::start_next_grid();
  if constexpr (tile::DxLayout<kTokenTiles, kRagged, kHasOffsets>::kBytes <= tile::kMostSharedBytes)
    linear_nf4_dx_tile<T, kTokenTiles, kRagged, kHasOffsets>(args,
                                                             int64_t{blockIdx.x % args.token_tiles} * (8 * kTokenTiles),
                                                             int64_t{blockIdx.x / args.token_tiles} * tile::kDxColumns);
}

}  // namespace qlora::kernels
