// The tile of the forward on tcgen05: 128 rows of w, and stages of 64 k, one quantization block per row. A decoder's
// thread has one row.
#pragma once

#include "cuda/tile/sm100/layout.cuh"

namespace qlora::tile {

template <class T, int kTokens>
struct LinearSm100Tile : Sm100Layout<T, kTokens, kTokens == 256 ? 4 : 8, 0, false> {
  static constexpr int kStageK = LinearSm100Tile::kStageTerms, kPackedLine = kStageK / 2;
  static constexpr int kRows = LinearSm100Tile::kOutputs;

  // Where the packed bytes of a stage begin: the byte in the row, and the row.
  __device__ static int2 packed_box(int k, int row) { return {k / 2, row}; }
  // The offset of 16-byte chunk `chunk` of a row's 32 packed bytes in a stage, as TMA swizzles them.
  __device__ static constexpr int packed_offset(int row, int chunk) {
    return row * kPackedLine + (chunk ^ (row >> 2 & 1)) * 16;
  }
};

}  // namespace qlora::tile
