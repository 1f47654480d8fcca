// The tile of the forward for few tokens: shapes, and where everything lies in shared memory.
//
// A CTA computes kRows rows n of w times all tokens, at most kTokens, over a slice of k. A segment is 64 k, never more
// than one quantization block, and a unit is two segments: a warp takes 64 rows of a unit at a time, the packed bytes
// straight from global memory to registers. kWarpsN warps share out the rows; kWarpsK groups of them take every
// kWarpsK-th unit, and their sums are added at the end. x and the decoded scales come to shared memory in stages.
//
// In a unit, lane (g = lane/4, t = lane%4) takes k = 32t..32t+31 of rows g and g+8 of each 16: the 16 packed bytes at
// byte 16t. So lanes 0 and 1 of a row have the unit's first segment, lanes 2 and 3 the second. The segments' sums must
// not mix, for their scales differ, but the mma adds over the lanes of a row. Its columns keep them apart: column
// 2 token + segment is x where the lane is of that segment, and else zero. As w is the row operand, whose loads and
// lookups are the work, columns of zeros cost next to nothing.
//
//               t = 0    t = 1  |  t = 2    t = 3            column 2 token      column 2 token + 1
//   row g       segment 0       |  segment 1         t = 0, 1   x[token]             0
//   row g + 8   segment 0       |  segment 1         t = 2, 3   0                    x[token]
//
// Step s = 0..7 feeds a lane's values 4s..4s+3 to the mma as k = 2t, 2t+1, 2t+8, 2t+9: the sum does not mind that k is
// permuted, as long as both operands are.
#pragma once

#include <cstdint>

#include "cuda/tile/any/pair_table.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"

namespace qlora::tile {

template <class T_, int kTokenTiles_>
struct FewTokensTile {
  using T = T_;
  static constexpr int kTokenTiles = kTokenTiles_;  // of 4 tokens
  static constexpr int kRowTiles = 4;               // of 16 rows, per warp
  static constexpr int kWarpsN = 2;                 // that share out a CTA's rows
  static constexpr int kWarpsK = 4;                 // groups of kWarpsN warps that share out its units

  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarpRows * kWarpsN;
  static constexpr int kTokens = 4 * kTokenTiles;
  static constexpr int kUnitSegments = 2;
  static constexpr int kRoundSegments = kUnitSegments * kWarpsK;  // that a CTA takes at a time
  static constexpr int kStageSegments = kTokens <= 8 ? 16 : 8;
  static_assert(kStageSegments % kRoundSegments == 0);

  // Ranks of LoRA whose h the kernel makes itself, at most. A CTA reads lora_a's part of its slice, rank / 32 times the
  // bytes of its weights, from L2: beyond 32 that would cost what a launch of its own does. Registers allow for fewer
  // where there are more tokens.
  static constexpr int kFoldedRanks = kTokens <= 8 ? 32 : 16;

  // The pair table leaves half of each 256-byte entry free, where two stages of x fit: a line is 64 k of a token.
  static constexpr int kStageXLines = kTokens * kStageSegments;
  static constexpr int kStageXBytes = kStageXLines * kPairTableEntryBytes;
  static_assert(2 * kStageXLines <= 256);
  static constexpr int kStageScaleBytes = kRows * kStageSegments * 4;

  static constexpr int kTable = 0;
  static constexpr int kX = kTable + kLineBytes;
  static constexpr int kDynamic8 = kTable + kPairTableBytes;
  static constexpr int kScales = kDynamic8 + 1024;
  static constexpr int kSharedBytes = kScales + 2 * kStageScaleBytes;

  // At the end the sums of the kWarpsK groups lie over all of that as [group][token][row], and after them those of h as
  // [warp][token][rank]. The pads make the tokens that a store instruction touches start 8 banks apart.
  static constexpr int kSumStride = kRows + 8;
  static constexpr int kHSumTokens = kTokens <= 8 ? 8 : 16;
  static constexpr int kHSumStride = kFoldedRanks + 4;
  static constexpr int kHSums = kWarpsK * kTokens * kSumStride * 4;
  static constexpr int kHSumBytes = kHSumTokens * kHSumStride * 4;  // of a warp
  static_assert(kHSums + kWarpsN * kWarpsK * kHSumBytes <= kSharedBytes);

  // Where 16-byte chunk `chunk` of a token's segment lies; lines are a multiple of 128 bytes apart. A load of the
  // product reads, in a quarter of a warp, two chunks of both segments of one token, and one of h the same half line of
  // two tokens.
  __device__ static constexpr int x_offset(int token, int segment, int chunk) {
    return (segment * kTokens + token) * kPairTableEntryBytes + (chunk ^ (segment & 1) ^ (token & 1) << 2) * 16;
  }

  // Where the scale of a row and segment lies: loads of a unit's two scales by 4 rows must not share banks.
  __device__ static constexpr int scale_offset(int row, int segment) {
    return (row * kStageSegments + (segment ^ (kStageSegments == 16 ? row & 2 : 0))) * 4;
  }
};

}  // namespace qlora::tile
