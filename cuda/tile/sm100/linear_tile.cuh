// The tile of the forward on tcgen05: 128 rows of w for each of kTokens tokens, in stages of 64 k, one quantization
// block per row.
//
//   warp 8 copies        x, packed bytes by TMA  -> shared memory                          `full`
//   warps 0-3, 4-7       decode stages in turn: packed bytes -> a in tensor memory         `ready`
//   warp 9 multiplies    a · x, summed in tensor memory, and frees the stage               `empty`, `done`
//
// A decoder's thread has one row. The sums of a complete tile go through the shared memory of x.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/tile/generic/nf4_pairs_f32.cuh"
#include "cuda/tile/sm90/layout.cuh"

namespace qlora::tile {

template <class T_, int kTokens_>
struct LinearSm100Tile {
  using T = T_;
  static constexpr int kTokens = kTokens_, kOutputs = 128, kRows = kOutputs;
  static constexpr int kLines = 1, kStageTerms = kSm90Line, kStageK = kStageTerms;
  static constexpr int kStages = kTokens == 256 ? 4 : 8;

  // Threads: those that decode a stage, in two groups, all of which store sums; and the warps of one thread each.
  static constexpr int kProducers = 128, kGroups = 2, kConsumers = kGroups * kProducers;
  static constexpr int kCopyWarp = kConsumers / 32, kMultiplyWarp = kCopyWarp + 1;
  static constexpr int kThreads = kConsumers + 2 * 32;
  static_assert(kStages % kGroups == 0);  // a slot belongs to one group

  // Tensor memory: the sums, then a of each slot. The whole of it, because an SM has one CTA.
  static constexpr int kTensorColumns = 512, kSlotColumns = kStageK / 2;
  static_assert(kTokens + kStages * kSlotColumns <= kTensorColumns);

  static constexpr int kLineBytes = kTokens * kSm90LineBytes, kStageTokenBytes = kLineBytes;
  static constexpr int kPackedLine = kStageK / 2, kStagePackedBytes = kRows * kPackedLine;

  static constexpr int kTokenLines = 0;
  static constexpr int kPacked = kTokenLines + kStages * kStageTokenBytes;
  static constexpr int kTable = kPacked + kStages * kStagePackedBytes;
  static constexpr int kScaleValues = kTable + kPairF32CopiesBytes;  // in the free halves of the table's entries
  static constexpr int kBarriers = kTable + kPairF32Bytes;
  static constexpr int kSlotBarriers = 32;
  static constexpr int kDone = kBarriers + kStages * kSlotBarriers;
  static constexpr int kTensorAddress = kDone + 8;
  static constexpr int kEnd = kTensorAddress + 8;
  static constexpr int kAlignment = 1024, kSharedBytes = kEnd + kAlignment;
  static_assert(kSharedBytes <= 227 * 1024);

  // Sums, as [token][row], when all stages of a tile have been multiplied.
  static constexpr int kSums = kTokenLines, kSumStride = kRows, kPartTokens = kTokens;
  static_assert(kTokens * kSumStride * 4 <= kStages * kStageTokenBytes);

  __device__ static constexpr int full(int slot) { return kBarriers + slot * kSlotBarriers; }
  __device__ static constexpr int empty(int slot) { return full(slot) + 8; }
  __device__ static constexpr int partner_empty(int slot) { return full(slot) + 16; }
  __device__ static constexpr int ready(int slot) { return full(slot) + 24; }
  static constexpr int kFullArrivals = 1, kEmptyArrivals = 1, kReadyArrivals = kProducers / 32;

  // Where the packed bytes of a stage begin: the byte in the row, and the row.
  __device__ static int2 packed_box(int k, int row) { return {k / 2, row}; }
  // The offset of 16-byte chunk `chunk` of a row's 32 packed bytes in a stage, as TMA swizzles them.
  __device__ static constexpr int packed_offset(int row, int chunk) {
    return row * kPackedLine + (chunk ^ (row >> 2 & 1)) * 16;
  }
};

// The ring buffer of stages, for every role. The parities of the barriers are those of the round.
template <class Tile>
struct Sm100Ring {
  uint32_t base;
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void wait_full() const { ptx::mbarrier_wait<0>(base + Tile::full(slot), parity); }
  __device__ __forceinline__ void wait_ready() const { ptx::mbarrier_wait<0>(base + Tile::ready(slot), parity); }
  __device__ __forceinline__ void wait_empty() const { ptx::mbarrier_wait<0>(base + Tile::empty(slot), parity ^ 1); }

  // Calls stage(number) for each stage of a tile, and chunk(first rank, steps) for each of its chunks of ranks, in
  // slots one after the other.
  template <class Work, class Stage, class Chunk>
  __device__ __forceinline__ void for_slots(const Work& work, const Stage& stage, const Chunk& chunk) {
#pragma unroll 1
    for (int i = 0; i < work.stages; ++i) {
      stage(i);
      pass();
    }
    work.for_chunks([&](int rank, int steps) {
      chunk(rank, steps);
      pass();
    });
  }

 private:
  __device__ __forceinline__ void pass() {
    if (++slot < Tile::kStages) return;
    slot = 0;
    parity ^= 1;
  }
};

}  // namespace qlora::tile
