// The tile of the forward for few tokens: its shape and its shared memory layout.
//
// A CTA computes kRows rows n of w for all tokens, at most kTokens, over a slice of k. A segment is 64 k and lies
// within one quantization block. A unit is two segments. A warp takes 64 rows of a unit at a time and loads their
// packed bytes straight from global memory to registers. kWarpsN warps divide the rows among them. kWarpsK groups of
// warps take every kWarpsK-th unit each, and their sums are added at the end. x and the decoded scales come to shared
// memory in stages.
//
// In a unit, lane (g = lane/4, t = lane%4) takes k = 32t..32t+31 of rows g and g+8 of every 16: the 16 packed bytes at
// byte 16t. So lanes t = 0 and 1 of a row hold the unit's first segment, and lanes t = 2 and 3 the second. The two
// segments have different scales, so their sums must stay apart, but the mma adds over all four lanes of a row. Its
// columns separate them: column 2 token + segment is x in the lanes of that segment and zero in the others. The
// kernel's time goes into loading and decoding w, the row operand, so half-empty columns cost next to nothing.
//
//               t = 0    t = 1  |  t = 2    t = 3            column 2 token      column 2 token + 1
//   row g       segment 0       |  segment 1         t = 0, 1   x[token]             0
//   row g + 8   segment 0       |  segment 1         t = 2, 3   0                    x[token]
//
// Step s = 0..7 feeds a lane's values 4s..4s+3 to the mma as k = 2t, 2t+1, 2t+8, 2t+9. This permutes k, which leaves
// the sum unchanged because both operands are permuted alike.
#pragma once

#include <cstdint>

#include "cuda/tile/generic/pair_table.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

template <class T_, int kTokenTiles_, bool kZeroPoints_ = false>
struct FewTokensTile {
  using T = T_;
  static constexpr bool kZeroPoints = kZeroPoints_;  // the weight has them, and its codes are integers
  static constexpr bool kInTable = false;            // as in LinearTile
  static constexpr int kTokenTiles = kTokenTiles_;   // of 4 tokens, per CTA
  static constexpr int kRowTiles = 4;                // of 16 rows, per warp
  static constexpr int kWarpsN = 2;                  // warps that divide a CTA's rows
  static constexpr int kWarpsK = 4;                  // groups of kWarpsN warps that divide its units

  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarpRows * kWarpsN;
  static constexpr int kTokens = 4 * kTokenTiles;
  static constexpr int kUnitSegments = 2;
  static constexpr int kRoundSegments = kUnitSegments * kWarpsK;  // segments that a CTA takes at a time
  static constexpr int kStageSegments = kTokens <= 8 ? 16 : 8;
  static_assert(kStageSegments % kRoundSegments == 0);

  // The most LoRA ranks for which the kernel computes h itself. A CTA reads lora_a over its slice from L2, rank / 32
  // times as many bytes as it reads of w. Beyond 32 ranks that costs as much as a separate launch for h. With more
  // tokens, registers allow fewer ranks.
  static constexpr int kFoldedRanks = kTokens <= 8 ? 32 : 16;

  // The pair table leaves half of each 256-byte entry free, and two stages of x fit there. A line is 64 k of a token.
  static constexpr int kStageXLines = kTokens * kStageSegments;
  static constexpr int kStageXBytes = kStageXLines * kPairTableEntryBytes;
  static_assert(2 * kStageXLines <= 256);
  static constexpr int kMinuends = kRows * kStageSegments * 4;  // from a scale to the block's IntegerPairs::minuend
  static constexpr int kStageScaleBytes = kMinuends * (kZeroPoints ? 2 : 1);

  static constexpr int kTable = 0;
  static constexpr int kX = kTable + kLineBytes;
  static constexpr int kScaleValues = kTable + kPairTableBytes;
  static constexpr int kScales = kScaleValues + 1024;
  static constexpr int kSharedBytes = kScales + 2 * kStageScaleBytes;

  // At the end, the sums of the kWarpsK groups overwrite all of this as [group][token][row]. The sums of h follow as
  // [warp][token][rank]. The padding makes the tokens that one store instruction touches start 8 banks apart.
  static constexpr int kSumStride = kRows + 8;
  static constexpr int kHSumTokens = kTokens <= 8 ? 8 : 16;
  static constexpr int kHSumStride = kFoldedRanks + 4;
  static constexpr int kHSums = kWarpsK * kTokens * kSumStride * 4;
  static constexpr int kHSumBytes = kHSumTokens * kHSumStride * 4;  // per warp
  static_assert(kHSums + kWarpsN * kWarpsK * kHSumBytes <= kSharedBytes);

  // The offset of 16-byte chunk `chunk` of a token's segment. Lines are a multiple of 128 bytes apart. In a quarter of
  // a warp, a load for y reads two chunks of both segments of one token, and a load for h reads the same half line of
  // two tokens. Neither has bank conflicts.
  __device__ static constexpr int x_offset(int token, int segment, int chunk) {
    return (segment * kTokens + token) * kPairTableEntryBytes + (chunk ^ (segment & 1) ^ (token & 1) << 2) * 16;
  }

  // The offset of the scale of a row and segment. A load of a unit's two scales for 4 rows has no bank conflicts.
  __device__ static constexpr int scale_offset(int row, int segment) {
    return (row * kStageSegments + (segment ^ (kStageSegments == 16 ? row & 2 : 0))) * 4;
  }
};

}  // namespace qlora::tile
