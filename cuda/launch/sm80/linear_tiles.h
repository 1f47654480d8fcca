// The forward's tensor-core tiles for 16-bit types, by their number of tokens, for a single weight and for experts.
// Rows and tokens per warp and per CTA were chosen by counting instructions and shared memory passes under the
// simulator.
#pragma once

#include <type_traits>

#include "cpp/format/problem.h"
#include "cuda/kernels/sm80/linear_nf4.cuh"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/tile/sm80/linear_tile.cuh"
#include "cuda/tuning/sm80.h"

namespace qlora::cuda::sm80 {

template <class T, int kTokens, int kStages, int kScaleColumns, bool kZeroPoints>
using LinearTile = tile::LinearTile<T, 2, kTokens / 8, 4, 2, 2, kStages, kScaleColumns, kZeroPoints>;

template <class T, bool kZeroPoints>
using Tile8 = LinearTile<T, 8, 4, kSegment, kZeroPoints>;
template <class T, int kScaleColumns = kSegment, bool kZeroPoints = false>
using Tile16 = LinearTile<T, 16, 4, kScaleColumns, kZeroPoints>;
template <class T, int kScaleColumns = kSegment, bool kZeroPoints = false>
using Tile32 = LinearTile<T, 32, 2, kScaleColumns, kZeroPoints>;
template <class T, int kScaleColumns = kSegment, bool kZeroPoints = false>
using Tile64 = LinearTile<T, 64, 3, kScaleColumns, kZeroPoints>;

// Calls use(zero_points) with a constant, for the weight of a regular problem.
template <class Use>
cudaError_t with_zero_points(const Weight& w, const Use& use) {
  return has_offsets(w) ? use(std::true_type{}) : use(std::false_type{});
}

// Calls use(tile) for a weight that scales_weights() accepts. Blocks of 16 have no tile of 64 tokens.
template <class T, class Use>
cudaError_t with_scaled_tile(const Weight& w, int64_t tokens, const Use& use) {
  if (w.scales.block_size < 32) return tokens == 16 ? use(Tile16<T, 16>()) : use(Tile32<T, 16>());
  switch (tokens) {
    case 16:
      return use(Tile16<T, 32>());
    case 32:
      return use(Tile32<T, 32>());
    default:
      return use(Tile64<T, 32>());
  }
}
static_assert(Tile64<bfloat16>::kSharedBytes <= kShared64 && Tile64<bfloat16>::kRows == kForwardRows);

template <class Tile, class T = typename Tile::T>
kernels::LinearArgs<T> make_linear_args(const LinearProblem& p, const T* h, const tile::LinearOutput<T>& out,
                                        int64_t token_tiles, int64_t segments_per_split) {
  return {.x = static_cast<const T*>(p.x),
          .packed = p.w.packed,
          .scales = tile::make_scale_view(p.w),
          .code = Tile::kScalesWeights || Tile::kZeroPoints ? tile::make_code_view(p.w.code)
                                                            : tile::make_pair_view<T>(p.w.code),
          .m = p.m,
          .n = p.w.n,
          .k = p.w.k,
          .lora = {h, static_cast<const T*>(p.lora.b), p.lora.rank, p.m, p.w.n, adapter_ranks(p.lora)},
          .out = out,
          .token_tiles = token_tiles,
          .segments_per_split = segments_per_split};
}

}  // namespace qlora::cuda::sm80
