// The work of a CTA in Hopper's kernels, for producers and consumers alike: its split of every tile of its cluster.
// CTAs are persistent. They fill the tables once and process tile after tile, and the producers run ahead into the next
// tile. If there are fewer tiles than SMs, the CTAs of a cluster divide a tile's sum into splits of whole stages.
#pragma once

#include <cstdint>

#include "cuda/tile/any/block_scale.cuh"
#include "cuda/tile/any/unroll.cuh"

namespace qlora::tile {

struct Sm90Plan {
  int64_t token_tiles, tiles;  // tiles along the tokens, and in total
  int splits;                  // the size of a cluster
  int stages, stages_per_split;
  int64_t rank;  // LoRA's rank, 0 without LoRA
};

inline constexpr int kSm90Chunk = 64;  // ranks per line

template <class Layout>
struct Sm90Work {
  static constexpr int kChunk = Layout::kLines * kSm90Chunk;  // ranks per stage

  const Sm90Plan& plan;
  int split, stage0, stages, chunks;

  __device__ __forceinline__ explicit Sm90Work(const Sm90Plan& p)
      : Sm90Work(p, static_cast<int>(blockIdx.x) % p.splits) {}
  __device__ __forceinline__ Sm90Work(const Sm90Plan& p, int of_split)
      : plan(p),
        split(of_split),
        stage0(split * p.stages_per_split),
        stages(min(p.stages - stage0, p.stages_per_split)),
        chunks(static_cast<int>((p.rank + kChunk - 1) / kChunk)) {}

  // Calls use(first token, first output) for each tile.
  template <class Use>
  __device__ __forceinline__ void for_tiles(const Use& use) const {
    const int64_t step = gridDim.x / plan.splits;
    for (int64_t tile = blockIdx.x / plan.splits; tile < plan.tiles; tile += step)
      use(tile % plan.token_tiles * Layout::kTokens, tile / plan.token_tiles * Layout::kOutputs);
  }

  // A kernel over experts has arguments per tile, and rows of w in one map for all experts (expert_work.cuh).
  template <class Args>
  __device__ __forceinline__ const Args& args_of(const Args& p) const {
    return p;
  }
  __device__ __forceinline__ const ScaleView& scales_of(const ScaleView& view) const { return view; }
  __device__ __forceinline__ int32_t first_row(int64_t) const { return 0; }

  // Calls use(slot, stage) for each stage. Producers and consumers go through the ring buffer's slots in rounds, and
  // all barriers of a round have one `parity`. If the last round is not full, pass(slot) hands on the remaining slots
  // empty. So slots are compile-time constants.
  template <class Pass, class Use>
  __device__ __forceinline__ void for_stages(uint32_t& parity, const Pass& pass, const Use& use) const {
    for (int stage = 0; stage < stages; stage += Layout::kStages, parity ^= 1) {
      unroll<Layout::kStages>([&](auto slot) {
        if (stage + slot < stages)
          use(slot, stage + slot);
        else
          pass(slot);
      });
    }
  }

  // Calls use(slot, chunk) for this split's chunks of ranks. Each chunk takes a round.
  template <class Pass, class Use>
  __device__ __forceinline__ void for_chunks(uint32_t& parity, const Pass& pass, const Use& use) const {
    for (int chunk = split; chunk < chunks; chunk += plan.splits, parity ^= 1) {
      use(Index<0>{}, chunk);
      unroll<Layout::kStages - 1>([&](auto slot) { pass(Index<slot + 1>{}); });
    }
  }

  // The number of wgmma steps, 16 ranks each, that a chunk takes.
  __device__ __forceinline__ int chunk_steps(int chunk) const {
    const int64_t left = plan.rank - int64_t{chunk} * kChunk;
    return static_cast<int>((left < kChunk ? left + 15 : kChunk) / 16);
  }
};

}  // namespace qlora::tile
