// The shared memory of the tensor-core dX kernel and who reads what of it.
//
//   0                  pair table, 256 rows of 256 bytes: table copies in the first half of a row, staged W in the
//   second
//                      half: row `64 * slot + r` holds the 128 bytes (256 columns) of W's row r of that stage
//   kDy                dy stages: [slot][token] rows of 64 n
//   kScales            scale stages: [slot][column group][row], float32
//   kDynamic8          the 8-bit map
//
// Swizzles, so that the fragment reads below and the copies' 16-byte writes are free of conflicts:
//   W: the 32-byte segment of row r holds slab `segment ^ (r >> 2 & 3)`;  dy: 16-byte chunk c of token i at c ^ (i & 3)
//   << 1
#pragma once

#include <cstdint>

#include "cuda/tile/block_scale.cuh"
#include "cuda/tile/nf4_pairs_f32.cuh"

namespace qlora::tile {

inline constexpr int kDxThreads = 256;
inline constexpr int kDxColumns = 256;     // of a CTA
inline constexpr int kDxSlabColumns = 64;  // of a warp
inline constexpr int kDxSlabs = kDxColumns / kDxSlabColumns;
inline constexpr int kDxStageRows = 64;
inline constexpr int kDxStepRows = 16;
inline constexpr int kDxDyRowBytes = kDxStageRows * 2;

// Columns that a staged scale is for, as a shift: 64, or 32 where only groups of 32 are sure to lie in one block.
__device__ __forceinline__ int dx_scale_group_shift(const ScaleView& view, int64_t k) {
  return view.block_shift == 5 || k % 64 != 0 ? 5 : 6;
}

template <int kTokenTiles>
struct DxLayout {
  static constexpr int kTokens = 8 * kTokenTiles;
  // 64 tokens take three stages, so that a CTA fits the 99 KB of the smallest devices.
  static constexpr int kStages = kTokenTiles == 8 ? 3 : 4;
  static constexpr int kScaleGroups = 9;  // blocks of 32 that 256 columns can touch
  static constexpr int kScaleStride = kDxStageRows + 8;
  static constexpr int kScaleStageBytes = kScaleGroups * kScaleStride * 4;
  static constexpr int kDyStageBytes = kTokens * kDxDyRowBytes;

  static constexpr int kDy = kPairF32Bytes;
  static constexpr int kScales = kDy + kStages * kDyStageBytes;
  static constexpr int kDynamic8 = kScales + kStages * kScaleStageBytes;
  static constexpr int kBytes = kDynamic8 + 1024;
  static_assert(kStages * kDxStageRows <= kPairF32Entries && kBytes <= 99 * 1024);

  __device__ static int w_row(int slot, int row) {
    return (slot * kDxStageRows + row) * kPairF32RowBytes + kPairF32CopiesBytes;
  }
  __device__ static int w_chunk(int slot, int row, int chunk) {
    return w_row(slot, row) + (((chunk >> 1) ^ (row >> 2 & 3)) << 5) + ((chunk & 1) << 4);
  }
  __device__ static int dy_chunk(int slot, int token, int chunk) {
    return kDy + slot * kDyStageBytes + token * kDxDyRowBytes + ((chunk ^ (token & 3) << 1) << 4);
  }
  __device__ static int scale(int slot, int group, int row) {
    return kScales + slot * kScaleStageBytes + (group * kScaleStride + row) * 4;
  }
};

}  // namespace qlora::tile
