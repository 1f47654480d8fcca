// What the tiles of Hopper's kernels share: the roles of a CTA's threads, and the layout of its shared memory.
//
// A CTA computes 128 outputs, rows n of w or columns k, for each of kTokens tokens. A warpgroup of producers fills a
// ring buffer of stages. Two warpgroups of consumers decode w into the register operand of wgmma and multiply. A stage
// holds the tokens' values (x or dy, in lines of 64 values or 128 bytes, as TMA swizzles them), packed bytes, and
// float32 scales.
//
// Addresses are relative to a base that puts the table of pairs at a multiple of 64 KB. A byte of w and the lane are
// then the lower half of an entry's address, and computing the address takes no addition. The space before the table
// holds whatever fits there. The pairs leave the second half of each entry free. It holds the values of 8-bit
// scale codes, with one copy per lane.
//
//     0     packed bytes, scales, sums, barriers        61 KB    table: 256 entries of 256 bytes        125 KB tokens
//           [slot] [slot]                                        [pairs 128 bytes][map 128 bytes] [slot]
#pragma once

#include <cstdint>

#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/code_tables.cuh"
#include "cuda/tile/generic/pair_table.cuh"

namespace qlora::tile {

inline constexpr int kSm90Line = 64, kSm90LineBytes = 128;  // the values of a line, in 16 bits

// The offset of the pair (i, i + 1), i even, in a token's line.
__device__ constexpr int sm90_line_offset(int token, int i) {
  return token * kSm90LineBytes + ((i / 8 ^ (token & 7)) * 16 + i % 8 * 2);
}

template <class T_, int kTokens_, int kLines_, int kStagePackedBytes_, int kStageScaleBytes_, int kProducerRegisters_>
struct Sm90Layout {
  using T = T_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kOutputs = 128;
  static constexpr int kLines = kLines_;  // lines of 64 values per token in a stage
  static constexpr int kStageTerms = kLines * kSm90Line;
  static constexpr int kStages = 3;
  static constexpr int kProducers = 128, kConsumers = 256;  // threads
  static constexpr int kThreads = kProducers + kConsumers;
  // The CTA starts with kLaunchRegisters per thread, which bench/cuda_static.py compares with what ptxas allocates.
  // setmaxnreg redistributes them. With a smaller pool, the consumers would wait for registers forever.
  static constexpr int kLaunchRegisters = 168, kProducerRegisters = kProducerRegisters_;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * kThreads - kProducerRegisters * kProducers) / kConsumers;
  static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0 && kConsumerRegisters <= 255);

  static constexpr int kLineBytes =
      kTokens * kSm90LineBytes;  // one line of all tokens: the part that one wgmma descriptor describes
  static constexpr int kStageTokenBytes = kLines * kLineBytes;
  static constexpr int kStagePackedBytes = kStagePackedBytes_;
  static constexpr int kStageScaleBytes = kStageScaleBytes_;

  // Sums are written out kPartTokens tokens at a time, as [token][output]. The padding makes the four tokens that one
  // store instruction touches start 8 banks apart.
  static constexpr int kPartTokens = 64;
  static constexpr int kParts = kTokens / kPartTokens;
  static constexpr int kSumStride = kOutputs + 4;

  static constexpr int kPacked = 0;
  static constexpr int kScales = kPacked + kStages * kStagePackedBytes;
  static constexpr int kSums = kScales + kStages * kStageScaleBytes;
  static constexpr int kBarriers = kSums + kPartTokens * kSumStride * 4;
  static constexpr int kSlotBarriers = 24;
  static constexpr int kTable = 61 * 1024;
  static constexpr int kScaleValues = kTable + kPairTableEntryBytes / 2;
  static constexpr int kTokenLines = kTable + kPairTableBytes;
  static constexpr int kEnd = kTokenLines + kStages * kStageTokenBytes;
  static constexpr int kTableAlignment = 64 * 1024;
  // Enough, wherever within the first 3 KB of shared memory the CTA's own part begins.
  static constexpr int kSharedBytes = kTableAlignment - kTable + kEnd;
  static_assert(kBarriers + kStages * kSlotBarriers <= kTable && kTable % 1024 == 0 && kTokenLines % 1024 == 0);

  __device__ static constexpr uint32_t base_address(uint32_t shared) {
    return (shared + kTable + kTableAlignment - 1) / kTableAlignment * kTableAlignment - kTable;
  }

  // The barriers of each stage: `full` (arrivals: the thread that starts the copies, and the producers' warps), `empty`
  // (the consumers' warps), and `partner_empty` (the thread of the partner CTA that starts copies, see Sm90Copies).
  __device__ static constexpr int full(int slot) { return kBarriers + slot * kSlotBarriers; }
  __device__ static constexpr int empty(int slot) { return full(slot) + 8; }
  __device__ static constexpr int partner_empty(int slot) { return full(slot) + 16; }
  static constexpr int kFullArrivals = 1 + kProducers / 32, kEmptyArrivals = kConsumers / 32;
};

// The offset of 16-byte chunk `chunk` in a line of 64 packed bytes, as TMA swizzles them.
__device__ constexpr int sm90_packed_offset(int line, int chunk) { return line * 64 + (chunk ^ (line >> 1 & 3)) * 16; }

// Stores the value of an 8-bit scale code in the free half of the table's entry for the code.
__device__ __forceinline__ void store_lane_scale_value(uint32_t scale_values, int entry, float scale) {
  const uint32_t value = __float_as_uint(scale);
  const uint32_t first = scale_values + entry * kPairTableEntryBytes + (entry & 7) * 16;
#pragma unroll
  for (int piece = 0; piece < 8; ++piece)
    ptx::store_shared_v4(first ^ (piece * 16), make_uint4(value, value, value, value));
}

// Fills the free halves of the table's entries with the values of 8-bit scale codes. Call from all threads of the CTA,
// and synchronize afterwards.
template <int kThreads>
__device__ __forceinline__ void fill_lane_scale_values(const ScaleView& view, uint32_t scale_values) {
  static_assert(kThreads >= 256);
  const int entry = threadIdx.x;
  if (entry < 256) store_lane_scale_value(scale_values, entry, scale_value(view, entry));
}

// Looks up the value of the 8-bit scale code in byte kByte of `codes`. `lane_table` is the table's address plus 4 ·
// lane.
template <int kByte>
__device__ __forceinline__ float lookup_scale_value(uint32_t lane_table, uint32_t codes) {
  constexpr int kHalf = kPairTableEntryBytes / 2;
  return ptx::load_shared_f32<kHalf>(ptx::prmt<0x7604 | kByte << 4>(codes, lane_table));
}

}  // namespace qlora::tile
