// y = x · wᵀ + h · lora_bᵀ + bias on Hopper's tensor cores, straight from the packed weight: yᵀ = w · xᵀ by wgmma, with
// w decoded into the register operand. TMA loads x and packed bytes. cuda/tile/sm90/linear_tile.cuh describes the tile
// and its layout.
//
// The scale of a quantization block is never applied to a weight: each segment is summed from zero, and then acc +=
// scale · sum.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/load.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/sm90/copies.cuh"
#include "cuda/tile/sm90/linear_tile.cuh"
#include "cuda/tile/sm90/operand.cuh"
#include "cuda/tile/sm90/roles.cuh"
#include "cuda/tile/sm90/sums.cuh"
#include "cuda/tile/sm90/work.cuh"

namespace qlora::kernels {

template <class T>
struct LinearSm90Args {
  tile::ScaleView scales;
  tile::CodeView code;
  int64_t m, n, k;
  tile::LoraOperands<T> lora;
  tile::LinearOutput<T> out;
  tile::Sm90Plan plan;
};

// The scales of a producer thread's row: two per stage, loaded one round of stages ahead of their use. Blocks are
// counted from the row's first block, in 32 bits. Past the row's end, and in rows that do not exist, the thread stores
// some finite scale, because it is multiplied by 0.
template <class Tile, int kScaleBytes>
class LinearSm90Scales {
  static constexpr int kStageSegments = Tile::kStageK / tile::kSegment;
  static_assert(kStageSegments == 2);
  static constexpr int kCodeBits = 8 * kScaleBytes % 32;

 public:
  __device__ __forceinline__ LinearSm90Scales(const tile::ScaleView& view, float unfactor, int64_t row, int64_t n,
                                              int64_t k, int stage0)
      : view_(view),
        unfactor_(unfactor),
        block0_(row * k >> view.block_shift),
        shift_(view.block_shift - 6),
        segment_(stage0 * kStageSegments),
        end_(row < n ? static_cast<int>(k / tile::kSegment) : 0),
        before_(static_cast<int>(row * k / tile::kSegment) & ((1 << shift_) - 1)),
        plain_codes_(view.scales.codes() + block0_ + segment_) {
    static_assert(tile::kSegment == 1 << 6);
#pragma unroll
    for (int slot = 0; slot < Tile::kStages; ++slot) load(slot);
  }

  // Stores the scales of the stage in `slot`, then loads the scales of the slot's next stage.
  __device__ __forceinline__ void store_and_load(int slot, uint32_t lane_table, float offset, uint32_t address) {
    float2 scale = absmax_[slot];
    if constexpr (kScaleBytes == 1) {
      const auto first = [&](uint32_t codes) { return tile::lookup_scale_value<0>(lane_table, codes); };
      const auto second = [&](uint32_t codes) { return tile::lookup_scale_value<1>(lane_table, codes); };
      scale.x = tile::decode_scale_code(scale.x, codes_[slot], first, offset);
      scale.y = tile::decode_scale_code(scale.y, codes_[slot], second, offset);
    } else if constexpr (kScaleBytes == 2) {
      scale.x = tile::decode_scale_half(view_, codes_[slot] & 0xFFFFu);
      scale.y = tile::decode_scale_half(view_, codes_[slot] >> 16);
    }
    ptx::store_shared_v2_f32(address, make_float2(scale.x * unfactor_, scale.y * unfactor_));
    load(slot);
  }

 private:
  __device__ __forceinline__ void load(int slot) {
    if (segment_ + 1 < plain_end_) {
      codes_[slot] = ptx::load_cached_u16(plain_codes_);
      absmax_[slot] = make_float2(nested_absmax_, nested_absmax_);
    } else {
      codes_[slot] = load_any(segment_, absmax_[slot].x);
      codes_[slot] |= load_any(segment_ + 1, absmax_[slot].y) << kCodeBits;
    }
    segment_ += kStageSegments;
    plain_codes_ += kStageSegments;
  }

  // Loads the scale of any segment. Returns its code.
  __device__ __forceinline__ uint32_t load_any(int segment, float& absmax) {
    absmax = 0.0f;
    if (segment >= end_) {
      // The values of a table may be NaN, except that of the row's own code.
      if (view_.scales.table == nullptr || end_ == 0) return kDynamic8ZeroCode;
      segment = end_ - 1;
    }
    const int64_t block = block0_ + ((before_ + segment) >> shift_);
    if constexpr (kScaleBytes == 4) {
      absmax = __ldg(view_.scales.floats() + block);
      return 0;
    } else if constexpr (kScaleBytes == 2) {
      return __ldg(tile::scale_halves(view_) + block);
    } else {
      int64_t left = end_;
      absmax = nested_absmax_ = 1.0f;
      if (view_.scales.nested_absmax != nullptr) {
        const int64_t nested = tile::nested_block(view_, block);
        absmax = nested_absmax_ = __ldg(view_.scales.nested_absmax + nested);
        left = (nested + 1) * view_.scales.nested_block_size - block0_;
      }
      const bool plain = shift_ == 0 && (reinterpret_cast<uintptr_t>(plain_codes_) & 1) == 0;
      plain_end_ = !plain ? 0 : static_cast<int>(left < end_ ? left : end_);
      return __ldg(view_.scales.codes() + block);
    }
  }

  const tile::ScaleView& view_;
  const float unfactor_;  // CodeView::unfactor of the weight's code
  int64_t block0_;
  // In segments: log2 of a block's length, the next segment, the row's end, and the part of the row's first block that
  // precedes the row.
  int shift_, segment_, end_, before_;
  // Before plain_end_, each segment is a block with its own code, the codes lie in pairs at even addresses, and
  // nested_absmax_ is their nested absmax.
  int plain_end_ = 0;
  const uint8_t* plain_codes_;
  float nested_absmax_ = 0.0f;
  float2 absmax_[Tile::kStages];
  uint32_t codes_[Tile::kStages];  // kCodeBits bits per scale: its code, or itself if it has 16 bits
};

template <class T>
__device__ __forceinline__ bool lora_is_vector(const tile::LoraOperands<T>& lora) {
  return lora.rank % 4 == 0 && (reinterpret_cast<uintptr_t>(lora.b) & 7) == 0;
}

// `started`: the stages of the first tile whose copies have been started.
template <class Tile, int kScaleBytes, class Work>
__device__ __forceinline__ void produce(const LinearSm90Args<typename Tile::T>& all, Work& work,
                                        tile::Sm90Copies<Tile>& copies, int started, uint32_t base) {
  const uint32_t lane_table = base + Tile::kTable + threadIdx.x % 32 * 4;
  const uint32_t scale_address = base + Tile::kScales + threadIdx.x * 8;
  tile::Sm90Producer<Tile> ring{base};
  const auto pass = [&](auto slot) { ring.pass(slot); };
  work.for_tiles([&](int64_t token0, int64_t n0) {
    const auto& view = work.scales_of(all.scales);
    const float offset = tile::nested_offset(view);
    LinearSm90Scales<Tile, kScaleBytes> scales(view, all.code.unfactor, n0 + threadIdx.x, all.n, all.k, work.stage0);
    work.for_stages(ring.parity, pass, [&](auto slot, int stage) {
      ring.wait(slot);
      if (ring.issues && stage >= started) copies.start(slot, stage, token0, n0, work.first_row(all.n));
      scales.store_and_load(slot, lane_table, offset, scale_address + slot * Tile::kStageScaleBytes);
      ring.publish(slot);
    });
    work.for_chunks(ring.parity, pass, [&](auto slot, int rank, int steps) {
      ring.wait(slot);
      ring.arrive_without_copies(slot);
      const uint32_t lines = base + Tile::kTokenLines + slot * Tile::kStageTokenBytes;
      const auto& p = work.args_of(all);
      if (lora_is_vector(p.lora))
        tile::store_low_rank<Tile, true>(p.lora, threadIdx.x, token0, rank, steps, lines);
      else
        tile::store_low_rank<Tile, false>(p.lora, threadIdx.x, token0, rank, steps, lines);
      ring.publish(slot);
    });
    started = 0;
    tile::attend_finish(work);
  });
}

// sum = a · x over one segment, as a group of wgmma of its own.
template <class Tile>
__device__ __forceinline__ void start_segment(tile::Sm90Sums<Tile>& sum, const uint32_t (&a)[4][4],
                                              const uint64_t (&x)[4]) {
  constexpr typename Tile::T kType{};
  ptx::wgmma_fence();
  ptx::wgmma_k16<true>(kType, sum, a[0], x[0]);
  ptx::wgmma_k16<false>(kType, sum, a[1], x[1]);
  ptx::wgmma_k16<false>(kType, sum, a[2], x[2]);
  ptx::wgmma_k16<false>(kType, sum, a[3], x[3]);
  ptx::wgmma_commit();
}

template <class Tile>
__device__ __forceinline__ void add_scaled(tile::Sm90Sums<Tile>& acc, const tile::Sm90Sums<Tile>& sum, float scale,
                                           float scale8) {
#pragma unroll
  for (int j = 0; j < Tile::kTokenTiles; ++j) {
    acc[j][0] = fmaf(scale, sum[j][0], acc[j][0]);
    acc[j][1] = fmaf(scale, sum[j][1], acc[j][1]);
    acc[j][2] = fmaf(scale8, sum[j][2], acc[j][2]);
    acc[j][3] = fmaf(scale8, sum[j][3], acc[j][3]);
  }
}

// Loads the wgmma's operand for a chunk of lora_b from rank `first` on, straight from global memory.
template <class Tile, bool kVector>
__device__ __forceinline__ void load_lora_b(const tile::LoraOperands<typename Tile::T>& lora, int64_t row,
                                            int64_t first, uint32_t (&a)[2][4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int step = i / 2, upper = i % 2;
    const uint2 ranks = tile::load_4_ranks<typename Tile::T, kVector, true>(lora.b + (row + 8 * upper) * lora.rank,
                                                                            first + step * 16 + threadIdx.x % 4 * 4,
                                                                            lora.rank, row + 8 * upper < lora.n);
    a[step / 4][step % 4][upper] = ranks.x, a[step / 4][step % 4][upper + 2] = ranks.y;
  }
}

template <class Tile, class Work>
__device__ __forceinline__ void consume(const LinearSm90Args<typename Tile::T>& all, Work& work, uint32_t base) {
  const int row = (threadIdx.x - Tile::kProducers) / 32 * 16 + threadIdx.x % 32 / 4;  // and row + 8
  const tile::LinearSm90Lane<Tile> lane(base, row, all.code);
  const tile::Sm90Descriptors<Tile> x(base + Tile::kTokenLines);
  tile::Sm90Consumer<Tile> ring{base};
  const auto pass = [&](auto slot) { ring.pass(slot); };
  tile::Sm90Sums<Tile> acc, sum = {};
  uint32_t a[2][4][4];

  work.for_tiles([&](auto token0, auto n0) {
#pragma unroll
    for (int j = 0; j < Tile::kTokenTiles; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
    ring.wait(tile::Index<0>{});
    lane.template decode<0, 0>(a[0]);
    // One segment's products run while the next segment is decoded.
    work.for_stages(ring.parity, pass, [&](auto slot, int stage) {
      constexpr int kNext = (slot + 1) % Tile::kStages;
      start_segment<Tile>(sum, a[0], x.of[slot][0]);
      lane.template decode<slot, 1>(a[1]);
      const float2 scale = lane.template scale<slot, 0>(), scale8 = lane.template scale<slot, 1>();
      ptx::wgmma_wait(sum);
      add_scaled<Tile>(acc, sum, scale.x, scale8.x);
      start_segment<Tile>(sum, a[1], x.of[slot][1]);
      if (stage + 1 < work.stages) {
        ring.wait_next(tile::Index<kNext>{});
        lane.template decode<kNext, 0>(a[0]);
      }
      ptx::wgmma_wait(sum);
      ring.release(slot);
      add_scaled<Tile>(acc, sum, scale.y, scale8.y);
    });
    const auto& p = work.args_of(all);
    work.for_chunks(ring.parity, pass, [&](auto slot, int rank, int steps) {
      if (lora_is_vector(p.lora))
        load_lora_b<Tile, true>(p.lora, n0 + row, rank, a);
      else
        load_lora_b<Tile, false>(p.lora, n0 + row, rank, a);
      ring.wait(slot);
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        if (step >= steps) break;
        ptx::wgmma_fence();
        ptx::wgmma_k16<false>(typename Tile::T{}, acc, a[step / 4][step % 4], x.of[slot][step / 4][step % 4]);
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait(acc);
      ring.release(slot);
    });
    tile::finish_tile<Tile, 8>(work, acc, row, p.out, token0, p.m, n0, p.n, base);
  });
}

// Grid: clusters of splits · multicast CTAs, at most as many as fit on the device and as there are tiles or pairs. The
// maps have boxes of 64 x kTokens / multicast values of x (128-byte swizzle) and of 64 x 128 packed bytes (64-byte
// swizzle). Requires k % 64 == 0 and a block size of at least 64.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_sm90_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap packed_map,
                           const __grid_constant__ LinearSm90Args<typename Tile::T> p) {
  extern __shared__ uint8_t shared_memory[];
  const uint32_t base = Tile::base_address(ptx::shared_address(shared_memory));
  const tile::Sm90Work<Tile> work(p.plan);
  tile::Sm90Copies<Tile> copies(work, base, x_map, packed_map);
  if (threadIdx.x == 0) {
    tile::start_ring<Tile>(base, x_map, packed_map);
    copies.start_early(work.first_stages());
  }
  tile::fill_pair_table<typename Tile::T, Tile::kThreads>(base + Tile::kTable, p.code);
  tile::fill_lane_scale_values<Tile::kThreads>(p.scales, base + Tile::kScaleValues);
  work.sync_begin();
  if (threadIdx.x >= Tile::kProducers) {
    ptx::take_registers<Tile::kConsumerRegisters>();
    consume<Tile>(p, work, base);
  } else {
    ptx::give_registers<Tile::kProducerRegisters>();
    tile::with_scale_bytes(p.scales,
                           [&](auto bytes) { produce<Tile, bytes>(p, work, copies, work.first_stages(), base); });
  }
}

}  // namespace qlora::kernels
