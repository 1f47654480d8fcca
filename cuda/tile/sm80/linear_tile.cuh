// The tile of the tensor-core forward: its shape and its shared memory layout.
//
// A CTA computes kRows rows n of w for kTokens tokens over a slice of k, in stages of kStageSegments segments. A
// segment is 64 consecutive k of every row: 32 packed bytes of w and 128 bytes of x, within one quantization block. w
// is the mma's row operand, so the mma's 16 x 16 operand is full even for a single token. kWarpsN warps divide the rows
// among them. kWarpsK groups of warps take every kWarpsK-th segment each, and their sums are added at the end.
//
// In a segment, lane (g = lane/4, t = lane%4) takes k = 16t..16t+15 of rows g and g+8 (8 packed bytes of each) and of
// token g (32 bytes). Step s = 0..3 feeds its values 4s..4s+3 to the mma as k = 2t, 2t+1, 2t+8, 2t+9. This permutes k,
// which leaves the sum unchanged because both operands are permuted alike.
//
// If a segment lies within one block, its sum is multiplied by the block's scale, which costs next to nothing. Smaller
// blocks, and blocks with offsets, have a tile with kScaleColumns = 16 or 32: the largest power of two of columns that
// share a scale. Scale and offset are then applied to each weight (nf4_pairs_f32.cuh). A lane's 16 k lie in one block.
// Zero points of integer codes need no such tile: with kZeroPoints, they are subtracted from the codes
// (integer_pairs.cuh).
#pragma once

#include <cstdint>

#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/pair_table.cuh"

namespace qlora::tile {

inline constexpr int kSegment = 64;
inline constexpr int kSegmentPackedBytes = kSegment / 2;
inline constexpr int kSegmentXBytes = kSegment * 2;
inline constexpr int kLineBytes = 128;  // bytes per line: 64 values of x of one token, or 32 scales of one row

template <class T_, int kRowTiles_, int kTokenTiles_, int kWarpsN_, int kWarpsK_, int kStageSegments_, int kStages_,
          int kScaleColumns_ = kSegment, bool kZeroPoints_ = false, int kTableCopies_ = kPairTableCopies>
struct LinearTile {
  using T = T_;
  static constexpr int kRowTiles = kRowTiles_;      // of 16 rows, per warp
  static constexpr int kTokenTiles = kTokenTiles_;  // of 8 tokens, per warp and per CTA
  static constexpr int kWarpsN = kWarpsN_;          // warps that divide a CTA's rows
  static constexpr int kWarpsK = kWarpsK_;          // groups of kWarpsN warps that divide its segments
  static constexpr int kStageSegments = kStageSegments_;
  static constexpr int kStages = kStages_;  // buffers, all but one of which are being filled
  static constexpr int kScaleColumns = kScaleColumns_;
  static constexpr bool kScalesWeights = kScaleColumns < kSegment;
  static constexpr bool kZeroPoints = kZeroPoints_;
  static_assert(!kZeroPoints || !kScalesWeights);
  static constexpr int kTableCopies = kTableCopies_;                 // of each pair: for the lanes, or for half of them
  static constexpr bool kInTable = kTableCopies < kPairTableCopies;  // whether all of a tile lies in the table
  static constexpr int kScaleBytes = kScalesWeights || kZeroPoints ? 8 : 4;  // with an offset or a minuend, or alone
  static constexpr int kMinuends = 4;  // from a scale to the block's IntegerPairs::minuend
  // Segments whose scales are staged at a time: a line per row. 64 tokens leave no registers for loading a line of
  // scales with zero points ahead, and where registers are few, none for a line of any.
  static constexpr int kLineGroups = (kInTable ? kLineBytes / 2 : kLineBytes) / kScaleBytes;
  static constexpr int kLineSegments = kLineGroups * kScaleColumns / kSegment;
  static constexpr int kWideSegments = kZeroPoints ? 4 : kFewRegisters ? 8 : kLineSegments;
  static constexpr int kScaleSegments = kTokenTiles == 8 ? kWideSegments : kLineSegments;

  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kRows = 16 * kRowTiles * kWarpsN;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStagesPerScales = kScaleSegments / kStageSegments;
  static_assert(kStageSegments % kWarpsK == 0 && kScaleSegments % kStageSegments == 0);
  static_assert(kStageSegments == 2 || kStageSegments == 4, "the swizzle of w is made for these");

  // The pair table leaves half of each 256-byte entry free. The scales of row r of w lie in the free half of entry r. x
  // lies in free halves, too, if it fits. With 16 copies of each pair, everything lies in the table, which then has the
  // 64 KB that a T4 has:
  //
  //   byte of an entry   0            64                      128                       192                  255
  //   entries 0..15      | 16 copies  | w, stage 0, row e     | scales of row e         | values of codes     |
  //   entries 16..127    | 16 copies  | w, stage 0, row e     | scales of row e         |                     |
  //   entries 128..255   | 16 copies  | w, stage 1, row e-128 | x, line e-128                                 |
  static constexpr int kStageXLines = kTokens * kStageSegments;
  static constexpr bool kXInTable = kRows + kStages * kStageXLines <= 256;
  static constexpr int kXLineStride = kXInTable ? kPairTableEntryBytes : kLineBytes;
  static constexpr int kStageXBytes = kStageXLines * kXLineStride;
  static constexpr int kPackedRowStride = kInTable ? kPairTableEntryBytes : kStageSegments * kSegmentPackedBytes;
  static constexpr int kStagePackedBytes = kRows * kPackedRowStride;

  static constexpr int kTable = 0;
  static constexpr int kScales = kTable + kLineBytes;
  static constexpr int kScaleValues = kInTable ? kScales + kLineBytes / 2 : kTable + kPairTableBytes;
  static constexpr int kPacked = kInTable ? kTable + kLineBytes / 2 : kScaleValues + 1024;
  static constexpr int kPackedEnd = kInTable ? kTable + kPairTableBytes : kPacked + kStages * kStagePackedBytes;
  static constexpr int kX = kXInTable ? kScales + kRows * kPairTableEntryBytes : kPackedEnd;
  static constexpr int kSharedBytes = kXInTable ? kPackedEnd : kX + kStages * kStageXBytes;
  static_assert(kRows <= 256);
  static_assert(!kInTable || (kXInTable && kStageSegments == 2 && kStages * kRows <= 256));

  // At the end, the sums of the kWarpsK groups overwrite all of this as [group][token][row]. The padding makes the four
  // tokens that one store instruction touches start 8 banks apart.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kSumBytes = kWarpsK * kTokens * kSumStride * 4;
  static_assert(kSumBytes + (kInTable ? 4 : 0) <= kSharedBytes);

  // The offset of 32-byte segment `segment` in a stage's row of w. The 4 rows that one load instruction reads together
  // (64-bit loads of half a warp) do not share banks.
  __device__ static constexpr int packed_offset(int row, int segment) {
    const int swizzle = kStageSegments == 4 ? row & 3 : (row >> 1) & 1;
    return row * kPackedRowStride + (segment ^ swizzle) * kSegmentPackedBytes;
  }

  // The offset of 16-byte chunk `chunk` of a token's segment. Tokens g and g+1 are read together, in every other chunk.
  __device__ static constexpr int x_offset(int token, int segment, int chunk) {
    return (segment * kTokens + token) * kXLineStride + (chunk ^ (token & 1)) * 16;
  }

  // The offset of the scale of a row and a group of columns. The rows g that are read together fall into different
  // banks: 8 rows of one group, or 4 rows of a segment's 2 or 4 groups.
  __device__ static constexpr int scale_offset(int row, int group) {
    const int swizzle = kScaleBytes == 4 ? (row & 7) << 2 : kScaleColumns > 16 ? (row & 7) << 1 : (row & 3) << 2;
    return row * kPairTableEntryBytes + (group ^ (swizzle & (kLineGroups - 1))) * kScaleBytes;
  }

  // The offset of the value of an 8-bit scale code.
  __device__ static constexpr int scale_value_offset(int code) {
    return kScaleValues + (kInTable ? code / 16 * kPairTableEntryBytes + code % 16 * 4 : code * 4);
  }
};

}  // namespace qlora::tile
