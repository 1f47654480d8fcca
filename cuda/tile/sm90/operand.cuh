// The operand that wgmma reads from shared memory in Hopper's kernels: tokens of x or dy, and of LoRA's low-rank
// product.
#pragma once

#include <cstdint>

#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/hold.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/generic/lora_step.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm90/layout.cuh"

namespace qlora::tile {

// The descriptors of the whole ring buffer, kept so that the loop computes none.
template <class Layout>
struct Sm90Descriptors {
  uint64_t of[Layout::kStages][Layout::kLines][4];  // [slot][line][step of 16 values]

  __device__ __forceinline__ explicit Sm90Descriptors(uint32_t token_lines) {
    unroll<Layout::kStages * Layout::kLines>([&](auto i) {
      unroll<4>([&](auto step) {
        uint64_t& to = of[i / Layout::kLines][i % Layout::kLines][step];
        to = ptx::wgmma_descriptor(token_lines) + (i * Layout::kLineBytes / 16 + step * ptx::kWgmmaStep);
        ptx::hold(to);
      });
    });
  }
};

// Writes ranks [first_rank, first_rank + 16 steps) of the low-rank product to the place of a stage's tokens, with zeros
// past its end. Of every 16 ranks, 4t..4t+3 become values 2t, 2t+1, 2t+8, 2t+9, so that lane t of the other operand
// also takes four neighbours. Call from all producers, with their numbers. The previous launch computes the product,
// and may still run.
template <class Layout, bool kVector>
__device__ __forceinline__ void store_low_rank(const LoraOperands<typename Layout::T>& lora, int producer,
                                               int64_t token0, int64_t first_rank, int steps, uint32_t lines) {
  const int t = producer % 4;
  ptx::wait_for_previous_grid();
#pragma unroll 1
  for (int token = producer / 4; token < Layout::kTokens; token += Layout::kProducers / 4) {
    for (int step = 0; step < steps; ++step) {
      const uint2 ranks = load_4_ranks<typename Layout::T, kVector>(
          lora.h + (token0 + token) * lora.rank, first_rank + step * 16 + 4 * t, lora.rank, token0 + token < lora.m);
      const uint32_t line = lines + step / 4 * Layout::kLineBytes;
      const int i = step % 4 * 16 + 2 * t;
      ptx::store_shared_u32(line + sm90_line_offset(token, i), ranks.x);
      ptx::store_shared_u32(line + sm90_line_offset(token, i + 8), ranks.y);
    }
  }
  ptx::fence_proxy_async();
}

}  // namespace qlora::tile
