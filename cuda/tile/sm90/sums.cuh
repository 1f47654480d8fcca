// The epilogue of a tile in Hopper's kernels. The sums go to shared memory, some tokens at a time. Each CTA of a
// cluster adds up the sums of all CTAs, in the order of their ranks, for its share of the tokens. It then adds bias,
// rounds once and stores.
#pragma once

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/linear_sum.cuh"
#include "cuda/tile/sm90/work.cuh"

namespace qlora::tile {

// A consumer's sums: one output of tokens 8j + 2t, +1, then the lane's second output of the same tokens.
template <class Layout>
using Sm90Sums = float[Layout::kTokenTiles][4];

// Stores the sums of a part. The lane's outputs are kOutputStep apart, and `output` is the first in the tile.
template <class Layout, int kOutputStep>
__device__ __forceinline__ void store_part(const Sm90Sums<Layout>& acc, int part, uint32_t base, int output) {
  const int t = threadIdx.x % 4;
  const uint32_t address = base + Layout::kSums + (2 * t * Layout::kSumStride + output) * 4;
  unroll<Layout::kTokenTiles>([&](auto j) {
    constexpr int token = j * 8 % Layout::kPartTokens;
    if (j * 8 / Layout::kPartTokens != part) return;
    unroll<2>([&](auto e) {
      constexpr int offset = (token + e) * Layout::kSumStride * 4;
      if constexpr (kOutputStep == 1) {
        ptx::store_shared_v2_f32<offset>(address, make_float2(acc[j][e], acc[j][2 + e]));
      } else {
        ptx::store_shared_f32<offset>(address, acc[j][e]);
        ptx::store_shared_f32<offset + kOutputStep * 4>(address, acc[j][2 + e]);
      }
    });
  });
}

// Call from all consumers, with their numbers.
template <class Layout>
__device__ __forceinline__ void finish_part(const Sm90Work<Layout>& work, int thread, int64_t token0, int64_t m,
                                            const OutputQuad<typename Layout::T>& output, uint32_t base) {
  const int splits = work.plan.splits;
  const int share = (Layout::kPartTokens + splits - 1) / splits, first = work.split * share;
  const int tokens = static_cast<int>(m - token0 < Layout::kPartTokens ? m - token0 : Layout::kPartTokens);
  const int end = min(first + share, tokens);
  for (int token = first + thread / 32; token < end; token += Layout::kConsumers / 32) {
    const uint32_t sums = base + Layout::kSums + (token * Layout::kSumStride + thread % 32 * 4) * 4;
    float4 sum = ptx::load_cluster_v4_f32(sums, work.partial_rank0());
    for (int split = 1; split < splits; ++split)
      sum = add(sum, ptx::load_cluster_v4_f32(sums, work.partial_rank0() + split));
    output.store(token0 + token, sum);
  }
}

// Call from all consumers. With splits, the producers must call attend_finish, because all threads of the cluster take
// part in its barriers. The second barrier of a part only protects the sums from being overwritten, but has to release
// as well: with barrier.cluster.arrive.relaxed, PTX orders no earlier access, not even a read.
template <class Layout, int kOutputStep>
__device__ __forceinline__ void finish_tile(const Sm90Work<Layout>& work, const Sm90Sums<Layout>& acc, int output,
                                            const LinearOutput<typename Layout::T>& out, int64_t token0, int64_t m,
                                            int64_t output0, int64_t outputs, uint32_t base) {
  const auto sync = [&] {
    __syncwarp();  // lanes whose outputs do not exist arrive early
    if (work.plan.splits > 1)
      ptx::cluster_sync();
    else
      ptx::barrier_sync<1, Layout::kConsumers>();
  };
  const OutputQuad<typename Layout::T> quad(out, output0 + threadIdx.x % 32 * 4, outputs);
#pragma unroll
  for (int part = 0; part < Layout::kParts; ++part) {
    store_part<Layout, kOutputStep>(acc, part, base, output);
    sync();
    finish_part<Layout>(work, threadIdx.x - Layout::kProducers, token0 + part * Layout::kPartTokens, m, quad, base);
    sync();
  }
}

// The producers' counterpart of finish_tile: joins the cluster's barriers.
template <class Layout>
__device__ __forceinline__ void attend_finish(const Sm90Work<Layout>& work) {
  if (work.plan.splits == 1) return;
  __syncwarp();  // lanes leave the loop of mbarrier_wait one by one, and the barrier needs the whole warp at once
  for (int part = 0; part < Layout::kParts; ++part) {
    ptx::cluster_sync();
    ptx::cluster_sync();
  }
}

}  // namespace qlora::tile
