// y = x · wᵀ + h · lora_bᵀ + bias on the tensor cores of compute capability 10.x, straight from the packed weight: yᵀ =
// w · xᵀ by tcgen05, with w decoded into tensor memory. TMA loads x and packed bytes. cuda/tile/sm100/layout.cuh
// describes the roles of the threads.
//
// A weight is decoded to float32, scale included, and rounded once, so that all terms have one sum in tensor memory.
// LoRA is the end of that sum: [x | h] · [w | lora_b]ᵀ.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/kernels/sm90/linear_nf4.cuh"
#include "cuda/ptx/tcgen05.cuh"
#include "cuda/tile/sm100/linear_tile.cuh"
#include "cuda/tile/sm100/roles.cuh"

namespace qlora::kernels {

// Decodes 64 weights of a row.
template <class Tile>
__device__ __forceinline__ void decode_row(uint32_t packed, int row, uint32_t table, float scale, uint32_t (&a)[32]) {
  const uint32_t copy = threadIdx.x % 16 * 8;
  tile::unroll<2>([&](auto chunk) {
    const uint4 words = ptx::load_shared_v4(packed + Tile::packed_offset(row, chunk));
    tile::unroll<4>([&](auto i) {
      const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
      tile::unroll<4>([&](auto byte) {
        const float2 value = tile::lookup_pair_f32<byte>(table, copy, word);
        a[chunk * 16 + i * 4 + byte] = ptx::pack2<typename Tile::T>(value.x * scale, value.y * scale);
      });
    });
  });
}

// Loads 64 ranks of a row of lora_b from rank `first` on, in the order of store_low_rank.
template <class T, bool kVector>
__device__ __forceinline__ void load_lora_row(const tile::LoraOperands<T>& lora, int64_t row, int first,
                                              uint32_t (&a)[32]) {
  tile::unroll<16>([&](auto i) {
    constexpr int step = i / 4, t = i % 4;
    const uint2 ranks =
        tile::load_4_ranks<T, kVector, true>(lora.b + row * lora.rank, first + 4 * i, lora.rank, row < lora.n);
    a[step * 8 + t] = ranks.x, a[step * 8 + t + 4] = ranks.y;
  });
}

template <class Tile>
__device__ __forceinline__ void decode_stages(const LinearSm90Args<typename Tile::T>& p,
                                              const tile::Sm90Work<Tile>& work, uint32_t tensor, uint32_t base) {
  const int row = threadIdx.x % Tile::kProducers;
  static_assert(Tile::kStageK == 1 << 6);
  tile::Sm100Decoder<Tile> decoder(base, tensor);
  tile::Sm100Scale<Tile> scale(p.scales, base);
  const auto& slot = decoder.ring.slot;
  work.for_tiles([&](int64_t token0, int64_t n0) {
    // Rows that do not exist have the scales of the last one.
    const int64_t segment0 = (n0 + row < p.n ? n0 + row : p.n - 1) * (p.k / Tile::kStageK) + work.stage0;
    const auto load_scale = [&](int stage) {
      if (stage < work.stages) scale.load(segment0 + stage >> p.scales.block_shift - 6);
    };
    load_scale(decoder.has_slot() ? 0 : 1);
    decoder.ring.for_slots(
        work,
        [&](int stage) {
          if (!decoder.has_slot()) return;
          uint32_t w[32];
          decoder.wait_full();
          const float factor = scale.decode();
          load_scale(stage + Tile::kGroups);  // which this thread decodes next
          decode_row<Tile>(base + Tile::kPacked + slot * Tile::kStagePackedBytes, row, base + Tile::kTable, factor, w);
          ptx::store_tensor_memory(decoder.w(), w);
          decoder.publish_slot();
        },
        [&](int rank, int steps) {
          if (!decoder.has_slot()) return;
          uint32_t b[32];
          const uint32_t lines = base + Tile::kTokenLines + slot * Tile::kStageTokenBytes;
          decoder.wait_full();
          if (lora_is_vector(p.lora)) {
            load_lora_row<typename Tile::T, true>(p.lora, n0 + row, rank, b);
            tile::store_low_rank<Tile, true>(p.lora, row, token0, rank, steps, lines);
          } else {
            load_lora_row<typename Tile::T, false>(p.lora, n0 + row, rank, b);
            tile::store_low_rank<Tile, false>(p.lora, row, token0, rank, steps, lines);
          }
          ptx::store_tensor_memory(decoder.w(), b);
          decoder.publish_slot();
        },
        [] {});
    decoder.finish(work, row, p.out, token0, p.m, n0, p.n);
  });
}

// Grid: clusters of splits · multicast CTAs, at most as many as fit on the device and as there are tiles or pairs. The
// maps have boxes of 64 x kTokens / multicast values of x (128-byte swizzle) and of 32 x 128 packed bytes (32-byte
// swizzle). Requires k % 64 == 0 and a block size of at least 64.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_sm100_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap packed_map,
                            const __grid_constant__ LinearSm90Args<typename Tile::T> p) {
  extern __shared__ uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory), base = tile::sm100_base<Tile>(shared);
  const int warp = threadIdx.x / 32;
  const tile::Sm90Work<Tile> work(p.plan);
  tile::Sm90Copies<Tile> copies(work, base, x_map, packed_map);
  const int early = work.first_stages();
  const uint32_t tensor = tile::start_tiles<Tile>(work, copies, early, x_map, packed_map, p.code, p.scales,
                                                  shared_memory + (base - shared), base);
  if (warp < Tile::kCopyWarp) {
    decode_stages<Tile>(p, work, tensor, base);
  } else if (warp == Tile::kCopyWarp) {
    tile::copy_stages<Tile>(work, copies, early, base);
  } else {
    tile::multiply_stages<Tile>(work, false, tensor, base);
    ptx::free_tensor_memory<Tile::kTensorColumns>(tensor);
  }
}

}  // namespace qlora::kernels
