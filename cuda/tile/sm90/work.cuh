// The work of a CTA in Hopper's kernels, for producers and consumers alike: its split of every tile of its cluster.
// CTAs are persistent. They fill the tables once and process tile after tile, and the producers run ahead into the next
// tile. If there are fewer tiles than SMs, the CTAs of a cluster divide a tile's sum into splits of whole stages. If
// there are many, a cluster may compute a pair of tiles of neighbouring outputs, and each of two partners copies half
// of the tokens' values for both (Sm90Copies). The second tile of a pair may lie beyond the last output. Its CTAs take
// part like others, with outputs that do not exist.
#pragma once

#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/hold.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm90/layout.cuh"

namespace qlora::tile {

// Counts of tiles are int because an output of 2^31 tiles would not fit any memory.
struct Sm90Plan {
  int token_tiles, tiles;  // tiles along the tokens, and in total; with pairs, pairs in total
  int clusters;            // in the grid
  int splits;
  int multicast;  // 2 for pairs, or 1; a cluster has splits · multicast CTAs
  int stages, stages_per_split;
  int rank, adapter_ranks;  // of LoRA, as in LoraOperands; 0 without LoRA
};

template <class Layout>
struct Sm90Work {
  static constexpr int kChunk = Layout::kStageTerms;  // ranks per stage

  const Sm90Plan& plan;
  int pair_tile;  // 0, or 1 for the second tile of a pair
  int split, stage0, stages;

  __device__ __forceinline__ explicit Sm90Work(const Sm90Plan& p)
      : Sm90Work(p, static_cast<int>(blockIdx.x) % (p.splits * p.multicast) / p.splits,
                 static_cast<int>(blockIdx.x) % p.splits) {}
  __device__ __forceinline__ Sm90Work(const Sm90Plan& p, int of_pair, int of_split)
      : plan(p),
        pair_tile(of_pair),
        split(of_split),
        stage0(split * p.stages_per_split),
        stages(min(p.stages - stage0, p.stages_per_split)) {}

  // Calls use(first token, first output) for each tile.
  template <class Use>
  __device__ __forceinline__ void for_tiles(const Use& use) const {
    for (int tile = tile0(); tile < plan.tiles; tile += plan.clusters) use(first_token(tile), first_output(tile));
  }
  __device__ __forceinline__ int tile0() const { return static_cast<int>(blockIdx.x) / cluster_ctas(); }
  __device__ __forceinline__ int64_t first_token(int tile) const {
    return int64_t{tile % plan.token_tiles} * Layout::kTokens;
  }
  __device__ __forceinline__ int64_t first_output(int tile) const {
    return int64_t{tile / plan.token_tiles * plan.multicast + pair_tile} * Layout::kOutputs;
  }

  // The number of stages that fit into the empty ring buffer.
  __device__ __forceinline__ int first_stages() const { return min(stages, Layout::kStages); }

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

  // Whether for_chunks calls `use` at all.
  __device__ __forceinline__ bool has_chunks() const { return split * kChunk < plan.adapter_ranks; }

  // Calls use(first rank, steps) for this split's chunks of ranks: the number of steps of the tensor cores, 16 ranks
  // each. As in for_lora_steps, splits take turns anew with each adapter of a stack.
  template <class Use>
  __device__ __forceinline__ void for_chunks(const Use& use) const {
    if (!has_chunks()) return;
    const auto end = [&](int rank) { return (rank / plan.adapter_ranks + 1) * plan.adapter_ranks; };  // of its adapter
    for (int rank = split * kChunk; rank < plan.rank;) {
      use(rank, (min(end(rank) - rank, kChunk) + 15) / 16);
      ptx::hold(rank);  // computes its adapter's end again, which is not worth a register
      const int next = rank + plan.splits * kChunk;
      rank = next < end(rank) ? next : end(rank) + split * kChunk;
    }
  }

  // Calls use(slot, first rank, steps) for each of them. A chunk takes a round of the ring buffer.
  template <class Pass, class Use>
  __device__ __forceinline__ void for_chunks(uint32_t& parity, const Pass& pass, const Use& use) const {
    for_chunks([&](int rank, int steps) {
      use(Index<0>{}, rank, steps);
      unroll<Layout::kStages - 1>([&](auto slot) { pass(Index<slot + 1>{}); });
      parity ^= 1;
    });
  }

  // Waits until all threads of the CTA, and those of a partner, have come here.
  __device__ __forceinline__ void sync_begin() const {
    __syncwarp();  // the cluster's barrier needs the whole warp at once
    if (plan.multicast > 1)
      ptx::cluster_sync();
    else
      __syncthreads();
  }

  __device__ __forceinline__ int cluster_ctas() const { return plan.splits * plan.multicast; }

  // The rank, in the cluster, of the first CTA that has a part of this tile's sum.
  __device__ __forceinline__ int partial_rank0() const { return pair_tile * plan.splits; }

  // With pairs: the rank of the CTA with the same split of the other tile.
  __device__ __forceinline__ int partner() const { return (1 - pair_tile) * plan.splits + split; }
};

}  // namespace qlora::tile
