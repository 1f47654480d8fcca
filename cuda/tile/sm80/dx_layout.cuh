// The shared memory layout of the tensor-core dX kernel.
//
// clang-format off
//
//   from 0 on    the pair table and the stages of W share 256 entries of 256 bytes. The first half of an entry holds the
//                table's copies, the second half holds a row of W (256 columns, packed). A slot holds the 64 rows of one
//                stage.
//
//                              0                              128                            256
//                    entry 0   | pair of byte 0, 16 copies     | W row 0 of slot 0            |
//                          1   | pair of byte 1, 16 copies     | W row 1 of slot 0            |
//                        ...   |                               |                              |
//                         64   | pair of byte 64, 16 copies    | W row 0 of slot 1            |
//                        ...   |                               |                              |
//                        255   | pair of byte 255, 16 copies   | W row 63 of slot 3, if used  |
//
//   kDy          stages of dy:      [slot][token][64 rows of W], 16 bits each
//   kScales      stages of scales:  [slot][column group][64 rows of W, padded to 72], float32
//   kScaleValues the values of 8-bit scale codes: [256], float32
//   kOffsets     stages of offsets, laid out as the scales, in the kernel for regular shapes with offsets
//
// Two swizzles keep the kernel's fragment reads and the 16-byte writes of the copies free of bank conflicts. They
// permute the 128 bytes that a row of W, or a token of dy, has in a slot. The tables show which slab or chunk lies at
// which byte:
//
//   W, by 32 bytes: slab (64 columns)           dy, by 16 bytes: chunk (8 rows of W)
//
//     row % 16     0   32   64   96              token % 4    0  16  32  48  64  80  96 112
//      0 ..  3     0    1    2    3                  0        0   1   2   3   4   5   6   7
//      4 ..  7     1    0    3    2                  1        2   3   0   1   6   7   4   5
//      8 .. 11     2    3    0    1                  2        4   5   6   7   0   1   2   3
//     12 .. 15     3    2    1    0                  3        6   7   4   5   2   3   0   1
//
// clang-format on
#pragma once

#include <cstdint>

#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/nf4_pairs_f32.cuh"

namespace qlora::tile {

inline constexpr int kDxThreads = 256;
inline constexpr int kDxColumns = 256;     // of W, per CTA
inline constexpr int kDxSlabColumns = 64;  // of W, per warp
inline constexpr int kDxSlabs = kDxColumns / kDxSlabColumns;
inline constexpr int kDxStageRows = 64;  // of W, per stage
inline constexpr int kDxStepRows = 16;   // of W, per mma
inline constexpr int kDxDyTokenBytes = kDxStageRows * 2;

// log2 of the number of columns that share a staged scale: 64 columns, or 32 if a group of 64 might straddle two
// quantization blocks.
__device__ __forceinline__ int dx_scale_group_shift(const ScaleView& view, int64_t k) {
  return view.block_shift == 5 || k % 64 != 0 ? 5 : 6;
}

template <int kTokenTiles, bool kRagged, bool kHasOffsets = false>
struct DxLayout {
  static constexpr int kTokens = 8 * kTokenTiles;
  // Large tiles take only three stages, so that a CTA fits the 99 KB of the smallest devices, except that of 64 tokens
  // with offsets.
  static constexpr int kStages = kTokenTiles == 8 || (kTokenTiles == 4 && kHasOffsets) ? 3 : 4;
  // The most quantization blocks that 256 columns can touch. Blocks hold at least 32 columns, or 16 in the ragged
  // kernel for 16 tokens.
  static constexpr int kScaleGroups = kRagged && kTokenTiles == 2 ? 17 : kHasOffsets ? 8 : 9;
  static constexpr int kScaleStride = kDxStageRows + 8;  // floats from a column group to the next: no bank conflicts
  static constexpr int kScaleStageBytes = kScaleGroups * kScaleStride * 4;
  static constexpr int kDyStageBytes = kTokens * kDxDyTokenBytes;

  static constexpr int kDy = kPairF32Bytes;
  static constexpr int kScales = kDy + kStages * kDyStageBytes;
  static constexpr int kScaleValues = kScales + kStages * kScaleStageBytes;
  static constexpr int kOffsets = kScaleValues + 1024;
  static constexpr int kBytes = kOffsets + (kHasOffsets ? kStages * kScaleStageBytes : 0);
  static_assert(kStages * kDxStageRows <= kPairF32Entries &&
                (kBytes + 4 <= 99 * 1024 || (kHasOffsets && kTokenTiles == 8)));  // 4: arrives_last

  // Offsets in bytes. `row` counts within the stage, `chunk` counts 16-byte chunks, `group` counts groups of columns
  // that share a scale.
  __device__ static int w_row(int slot, int row) {
    return (slot * kDxStageRows + row) * kPairF32EntryBytes + kPairF32CopiesBytes;
  }
  __device__ static int w_chunk(int slot, int row, int chunk) {
    return w_row(slot, row) + (((chunk >> 1) ^ (row >> 2 & 3)) << 5) + ((chunk & 1) << 4);
  }
  __device__ static int dy_chunk(int slot, int token, int chunk) {
    return kDy + slot * kDyStageBytes + token * kDxDyTokenBytes + ((chunk ^ (token & 3) << 1) << 4);
  }
  __device__ static int scale(int slot, int group, int row) {
    return kScales + slot * kScaleStageBytes + (group * kScaleStride + row) * 4;
  }
  __device__ static int offset(int slot, int group, int row) { return scale(slot, group, row) + kOffsets - kScales; }
};

}  // namespace qlora::tile
