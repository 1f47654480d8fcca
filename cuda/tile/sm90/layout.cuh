// What the tiles of Hopper's kernels have in common: who does what in a CTA, and the map of its shared memory.
//
// A CTA makes 128 outputs, rows n of w or columns k, of each of kTokens tokens. A warpgroup of producers fills a ring
// of stages; two warpgroups of consumers decode w into the register operand of wgmma and multiply. A stage has the
// tokens' values, x or dy, in lines of 64 that are 128 bytes, as TMA swizzles them; packed bytes; and scales in
// float32.
//
// Addresses are relative to a base such that the table of pairs lies at a multiple of 64 KB: then a byte of w and the
// lane are the lower half of an entry's address, and need not be added to anything. What fits before it lies there. The
// second half of each entry, which the pairs leave free, is the map of nested scale codes, a copy a lane.
//
//     0     packed bytes, scales, sums, barriers        61 KB    table: 256 entries of 256 bytes        125 KB tokens
//           [slot] [slot]                                        [pairs 128 bytes][map 128 bytes] [slot]
#pragma once

#include <cstdint>

#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/any/code_tables.cuh"
#include "cuda/tile/any/pair_table.cuh"

namespace qlora::tile {

template <class T_, int kTokens_, int kLines_, int kStagePackedBytes_, int kStageScaleBytes_>
struct Sm90Layout {
  using T = T_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kOutputs = 128;
  static constexpr int kLines = kLines_;  // of 64 values that a token has in a stage
  static constexpr int kStages = 3;
  static constexpr int kProducers = 128, kConsumers = 256;  // threads
  static constexpr int kThreads = kProducers + kConsumers;
  // The 168 registers a thread that the CTA starts with, dealt out anew.
  static constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;

  static constexpr int kLineBytes = kTokens * 128;  // a line of all tokens: what one descriptor of wgmma describes
  static constexpr int kStageTokenBytes = kLines * kLineBytes;
  static constexpr int kStagePackedBytes = kStagePackedBytes_;
  static constexpr int kStageScaleBytes = kStageScaleBytes_;

  // Sums go out by kPartTokens tokens at a time, as [token][output]. The pad makes the four tokens that a store
  // instruction touches start 8 banks apart.
  static constexpr int kPartTokens = 64;
  static constexpr int kParts = kTokens / kPartTokens;
  static constexpr int kSumStride = kOutputs + 4;

  static constexpr int kPacked = 0;
  static constexpr int kScales = kPacked + kStages * kStagePackedBytes;
  static constexpr int kSums = kScales + kStages * kStageScaleBytes;
  static constexpr int kBarriers = kSums + kPartTokens * kSumStride * 4;
  static constexpr int kTable = 61 * 1024;
  static constexpr int kDynamic8 = kTable + kPairTableEntryBytes / 2;
  static constexpr int kTokenLines = kTable + kPairTableBytes;
  static constexpr int kEnd = kTokenLines + kStages * kStageTokenBytes;
  static constexpr int kTableAlignment = 64 * 1024;
  // Enough wherever in its first 3 KB the shared memory of a CTA begins to be its own.
  static constexpr int kSharedBytes = kTableAlignment - kTable + kEnd;
  static_assert(kBarriers + kStages * 16 <= kTable && kTable % 1024 == 0 && kTokenLines % 1024 == 0);

  __device__ static constexpr uint32_t base_address(uint32_t shared) {
    return (shared + kTable + kTableAlignment - 1) / kTableAlignment * kTableAlignment - kTable;
  }

  // Barriers of each stage: filled (arrivals: the thread that starts the copies, and the producers' warps), and free
  // again (the consumers' warps).
  __device__ static constexpr int full(int slot) { return kBarriers + slot * 16; }
  __device__ static constexpr int empty(int slot) { return full(slot) + 8; }
  static constexpr int kFullArrivals = 1 + kProducers / 32, kEmptyArrivals = kConsumers / 32;

  // Where the pair (i, i + 1), i even, of a token's line lies.
  __device__ static constexpr int line_offset(int token, int i) {
    return token * 128 + ((i / 8 ^ (token & 7)) * 16 + i % 8 * 2);
  }
};

// Lines of 64 packed bytes, as TMA swizzles them: where 16-byte chunk `chunk` of one lies.
__device__ constexpr int sm90_packed_offset(int line, int chunk) { return line * 64 + (chunk ^ (line >> 1 & 3)) * 16; }

// Fills the free halves of the table's entries with the map of nested scale codes. Whole CTA; the caller synchronises.
template <int kThreads>
__device__ __forceinline__ void fill_lane_dynamic8(uint32_t dynamic8) {
  for (int entry = threadIdx.x; entry < 256; entry += kThreads) {
    const uint32_t value = __float_as_uint(c_dynamic8.value[entry]);
    const uint32_t first = dynamic8 + entry * kPairTableEntryBytes + (entry & 7) * 16;
#pragma unroll
    for (int piece = 0; piece < 8; ++piece)
      ptx::store_shared_v4(first ^ (piece * 16), make_uint4(value, value, value, value));
  }
}

// The value of the nested scale code in byte kByte of `codes`. `lane_table` is the table's address plus 4 · lane.
template <int kByte>
__device__ __forceinline__ float lookup_dynamic8(uint32_t lane_table, uint32_t codes) {
  constexpr int kHalf = kPairTableEntryBytes / 2;
  return ptx::load_shared_f32<kHalf>(ptx::prmt<0x7604 | kByte << 4>(codes, lane_table));
}

}  // namespace qlora::tile
