// What the tiles of the kernels on tcgen05 share: the roles of a CTA's warps, the layout of its memory, and the ring
// buffer of stages. A tile has 128 outputs, rows n of w or columns k, for each of kTokens tokens, and a stage 64 terms
// of their sums.
//
//   warp 8 copies        x or dy and packed bytes by TMA -> shared memory                  `full`
//   warps 0-3, 4-7       decode stages in turn: packed bytes -> w in tensor memory         `ready`
//   warp 9 multiplies    w · x, summed in tensor memory, and frees the stage               `empty`, `done`
//
// The sums of a complete tile go through the shared memory of x.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/tile/generic/nf4_pairs_f32.cuh"
#include "cuda/tile/sm90/layout.cuh"

namespace qlora::tile {

// kChunksFirst: LoRA's ranks are the first slots of a tile, and not the last.
template <class T_, int kTokens_, int kStages_, int kStageScaleBytes_, bool kChunksFirst_>
struct Sm100Layout {
  using T = T_;
  static constexpr int kTokens = kTokens_, kOutputs = 128, kStages = kStages_;
  static constexpr int kLines = 1, kStageTerms = kSm90Line;
  static constexpr bool kChunksFirst = kChunksFirst_;

  // Threads: those that decode a stage, in two groups, all of which store sums; and the warps of one thread each.
  static constexpr int kProducers = 128, kGroups = 2, kConsumers = kGroups * kProducers;
  static constexpr int kCopyWarp = kConsumers / 32, kMultiplyWarp = kCopyWarp + 1;
  static constexpr int kThreads = kConsumers + 2 * 32;
  static_assert(kStages % kGroups == 0);  // a slot belongs to one group

  // Tensor memory: the sums, then w of each slot. The whole of it, because an SM has one CTA.
  static constexpr int kTensorColumns = 512, kSlotColumns = kStageTerms / 2;
  static_assert(kTokens + kStages * kSlotColumns <= kTensorColumns);

  static constexpr int kLineBytes = kTokens * kSm90LineBytes, kStageTokenBytes = kLineBytes;
  static constexpr int kStagePackedBytes = kOutputs * kStageTerms / 2;
  static constexpr int kStageScaleBytes = kStageScaleBytes_;

  static constexpr int kTokenLines = 0;
  static constexpr int kPacked = kTokenLines + kStages * kStageTokenBytes;
  static constexpr int kTable = kPacked + kStages * kStagePackedBytes;
  static constexpr int kScaleValues = kTable + kPairF32CopiesBytes;  // in the free halves of the table's entries
  static constexpr int kScales = kTable + kPairF32Bytes;
  static constexpr int kBarriers = kScales + kStages * kStageScaleBytes;
  static constexpr int kSlotBarriers = 32;
  static constexpr int kDone = kBarriers + kStages * kSlotBarriers;
  static constexpr int kMasked = kDone + 8;
  static constexpr int kTensorAddress = kMasked + 8;
  static constexpr int kEnd = kTensorAddress + 8;
  static constexpr int kAlignment = 1024, kSharedBytes = kEnd + kAlignment;
  static_assert(kSharedBytes <= 227 * 1024);

  // Sums, as [token][output], when all stages of a tile have been multiplied.
  static constexpr int kSums = kTokenLines, kSumStride = kOutputs, kPartTokens = kTokens;
  static_assert(kTokens * kSumStride * 4 <= kStages * kStageTokenBytes);

  __device__ static constexpr int full(int slot) { return kBarriers + slot * kSlotBarriers; }
  __device__ static constexpr int empty(int slot) { return full(slot) + 8; }
  __device__ static constexpr int partner_empty(int slot) { return full(slot) + 16; }
  __device__ static constexpr int ready(int slot) { return full(slot) + 24; }
  static constexpr int kFullArrivals = 1, kEmptyArrivals = 1, kReadyArrivals = kProducers / 32;
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

  // Calls stage(number) for each stage of a tile, chunk(first rank, steps) for each of its chunks of ranks, in slots
  // one after the other, and between() behind the first kind.
  template <class Work, class Stage, class Chunk, class Between>
  __device__ __forceinline__ void for_slots(const Work& work, const Stage& stage, const Chunk& chunk,
                                            const Between& between) {
    if constexpr (!Tile::kChunksFirst) {
      for_stages(work, stage);
      between();
    }
    work.for_chunks([&](int rank, int steps) {
      chunk(rank, steps);
      pass();
    });
    if constexpr (Tile::kChunksFirst) {
      between();
      for_stages(work, stage);
    }
  }

 private:
  template <class Work, class Stage>
  __device__ __forceinline__ void for_stages(const Work& work, const Stage& stage) {
#pragma unroll 1
    for (int i = 0; i < work.stages; ++i) {
      stage(i);
      pass();
    }
  }
  __device__ __forceinline__ void pass() {
    if (++slot < Tile::kStages) return;
    slot = 0;
    parity ^= 1;
  }
};

}  // namespace qlora::tile
