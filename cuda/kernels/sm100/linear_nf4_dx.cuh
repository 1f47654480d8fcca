// dx = dy · w + mask ∘ (g · a) · keep_scale on the tensor cores of compute capability 10.x, straight from the packed
// weight: dxᵀ = wᵀ · dyᵀ by tcgen05, with wᵀ decoded into tensor memory. TMA loads dy and packed bytes.
// cuda/tile/sm100/layout.cuh describes the roles of the threads, and dx_tile.cuh how they decode. LoRA's product comes
// first, so dropout can mask it in tensor memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cpp/format/philox.h"
#include "cuda/kernels/sm90/linear_nf4_dx.cuh"
#include "cuda/ptx/tcgen05.cuh"
#include "cuda/tile/sm100/dx_tile.cuh"
#include "cuda/tile/sm100/roles.cuh"

namespace qlora::kernels {

// Applies dropout to 32 tokens of the thread's column: dropped elements become zero, and the others are scaled. One
// call of Philox draws the four columns of threads t, t + 8, t + 16 and t + 24 of the warp, for one token. So each of
// them draws for every fourth token. `index` is that of the first token and the first of the four columns. The drawing
// loop is not unrolled, because Philox is long.
__device__ __forceinline__ void mask_sums(const Dropout& dropout, int64_t index, int64_t k, float (&sum)[32]) {
  const int lane = threadIdx.x % 32, column = lane / 8;
  uint32_t drawn = 0;  // bit 4i + c: whether column c of token 4i + `column` is kept
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const auto group = static_cast<uint64_t>(index + (4 * i + column) * k) / 4;
    const Philox4 random = philox4x32_10(dropout.key(), group);
#pragma unroll
    for (int c = 0; c < 4; ++c) drawn |= static_cast<uint32_t>(dropout.keeps(random.lane[c])) << (4 * i + c);
  }
  const float keep_scale = static_cast<float>(dropout.keep_scale);
  tile::unroll<4>([&](auto of) {
    const uint32_t kept = __shfl_sync(~0u, drawn, lane % 8 + 8 * of) >> column;
    tile::unroll<8>([&](auto i) {
      float& v = sum[4 * i + of];
      v = kept >> (4 * i) & 1 ? v * keep_scale : 0.0f;
    });
  });
}

template <class Tile>
__device__ __forceinline__ void decode_dx_stages(const DxSm90Args<typename Tile::T>& p,
                                                 const tile::Sm90Work<Tile>& work, bool masks, uint32_t tensor,
                                                 uint32_t base) {
  const int thread = threadIdx.x % Tile::kProducers;
  const tile::DxSm100Lane<Tile> lane(base);
  tile::Sm100Decoder<Tile> decoder(base, tensor);
  tile::Sm100Scale<Tile> scale(p.scales, base);
  const auto& slot = decoder.ring.slot;
  const auto publish = [&](const uint32_t (&w)[2][16]) {
    ptx::store_tensor_memory(decoder.w(), w[0]);
    ptx::store_tensor_memory(decoder.w() + (16 << 16), w[1]);
    decoder.publish_slot();
  };
  work.for_tiles([&](int64_t token0, int64_t column0) {
    // Rows that do not exist have the scales of the last one, and columns those of the first.
    const int64_t row0 = int64_t{work.stage0} * Tile::kStageRows + thread % Tile::kStageRows;
    const int64_t group_column = column0 + thread / Tile::kStageRows * Tile::kGroupColumns;
    const int64_t column = group_column < p.k ? group_column : 0;
    const auto load_scale = [&](int stage) {
      const int64_t row = row0 + stage * Tile::kStageRows;
      if (stage < work.stages) scale.load((row < p.n ? row : p.n - 1) * p.k + column >> p.scales.block_shift);
    };
    bool loaded = false;
    decoder.ring.for_slots(
        work,
        [&](int stage) {
          if (!decoder.has_slot()) return;
          uint32_t w[2][16];
          if (!loaded) load_scale(stage);
          loaded = true;
          decoder.wait_full();
          ptx::store_shared_f32(base + Tile::kScales + slot * Tile::kStageScaleBytes + thread * 4, scale.decode());
          ptx::barrier_sync<Tile::kProducers>(2 + decoder.group);
          load_scale(stage + Tile::kGroups);  // which this thread stores next
          lane.decode(slot, w);
          publish(w);
        },
        [&](int rank, int steps) {
          if (!decoder.has_slot()) return;
          uint32_t a[2][4][4];
          const uint32_t lines = base + Tile::kTokenLines + slot * Tile::kStageTokenBytes;
          load_lora_a(p, column0 + lane.column, rank, a[0]);
          load_lora_a(p, column0 + lane.column + 2, rank, a[1]);
          decoder.wait_full();
          if (p.g.rank % 4 == 0)
            tile::store_low_rank<Tile, true>(p.g, thread, token0, rank, steps, lines);
          else
            tile::store_low_rank<Tile, false>(p.g, thread, token0, rank, steps, lines);
          uint32_t w[2][16];
          tile::unroll<32>([&](auto i) { w[i / 16][i % 16] = a[i / 16][i % 16 / 4][i % 4]; });
          publish(w);
        },
        [&] {
          if (!masks) return;
          decoder.wait_done();
          decoder.for_sums([&](uint32_t address, int token) {
            float sum[32];
            uint32_t masked[32];
            ptx::load_tensor_memory(sum, address);
            mask_sums(p.dropout, (token0 + token) * p.k + column0 + lane.output / 4 * 4, p.k, sum);
            tile::unroll<32>([&](auto i) { masked[i] = __float_as_uint(sum[i]); });
            ptx::store_tensor_memory(address, masked);
          });
          decoder.publish(base + Tile::kMasked);
        });
    decoder.finish(work, lane.output, p.out, token0, p.m, column0, p.k);
  });
}

// Grid: clusters of splits · multicast CTAs, at most as many as fit on the device and as there are tiles or pairs. The
// maps have boxes of 64 x kTokens / multicast values of dy (128-byte swizzle) and of 64 x 64 packed bytes (64-byte
// swizzle). Requires k % 64 == 0, a block size of at least 64, and lora_a aligned to 4 bytes.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_dx_sm100_kernel(const __grid_constant__ CUtensorMap dy_map,
                               const __grid_constant__ CUtensorMap packed_map,
                               const __grid_constant__ DxSm90Args<typename Tile::T> p) {
  extern __shared__ uint8_t shared_memory[];
  ptx::start_next_grid();
  const uint32_t shared = ptx::shared_address(shared_memory), base = tile::sm100_base<Tile>(shared);
  const int warp = threadIdx.x / 32;
  const tile::Sm90Work<Tile> work(p.plan);
  tile::Sm90Copies<Tile> copies(work, base, dy_map, packed_map);
  const bool has_lora = work.has_chunks(), masks = has_lora && p.dropout.active();
  // Chunks of ranks come first, and would take the slots of stages that were started early.
  const int early = has_lora ? 0 : work.first_stages();
  const uint32_t tensor = tile::start_tiles<Tile>(work, copies, early, dy_map, packed_map, p.code, p.scales,
                                                  shared_memory + (base - shared), base);
  if (warp < Tile::kCopyWarp) {
    decode_dx_stages<Tile>(p, work, masks, tensor, base);
  } else if (warp == Tile::kCopyWarp) {
    tile::copy_stages<Tile>(work, copies, early, base);
  } else {
    tile::multiply_stages<Tile>(work, masks, tensor, base);
    ptx::free_tensor_memory<Tile::kTensorColumns>(tensor);
  }
}

}  // namespace qlora::kernels
