// The forward's tensor-core tiles for 16-bit types, by their number of tokens, for a single weight and for experts.
// Rows and tokens per warp and per CTA were chosen by counting instructions and shared memory passes under the
// simulator.
#pragma once

#include "cuda/tile/sm80/linear_tile.cuh"
#include "cuda/tuning.h"

namespace qlora::cuda {

template <class T, int kTokens, int kStages>
using LinearTile = tile::LinearTile<T, 2, kTokens / 8, 4, 2, 2, kStages>;

template <class T>
using Tile8 = LinearTile<T, 8, 4>;
template <class T>
using Tile16 = LinearTile<T, 16, 4>;
template <class T>
using Tile32 = LinearTile<T, 32, 2>;
template <class T>
using Tile64 = LinearTile<T, 64, 3>;
static_assert(Tile64<bfloat16>::kSharedBytes <= kShared64);

}  // namespace qlora::cuda
