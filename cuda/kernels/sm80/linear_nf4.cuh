// y = x · wᵀ + h · lora_bᵀ + bias on tensor cores, straight from the packed weight. cp.async copies stages of x and
// packed bytes, the pair table decodes them to registers, and the accumulators are float32.
// cuda/tile/sm80/linear_tile.cuh describes the tile shapes and layouts.
//
// The scale of a large quantization block is not applied to its weights: each segment is summed from zero, and then acc
// += scale · sum. Zero points of integer codes are subtracted from the codes, which is exact. Tiles for small blocks
// and for other offsets decode each weight, rounded once.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/lora_step.cuh"
#include "cuda/tile/generic/nf4_pairs_f32.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/integer_pairs.cuh"
#include "cuda/tile/sm80/k_slices.cuh"
#include "cuda/tile/sm80/linear_copy.cuh"
#include "cuda/tile/sm80/linear_sum.cuh"
#include "cuda/tile/sm80/linear_tile.cuh"
#include "cuda/tile/sm80/scale_stage.cuh"

namespace qlora::kernels {

template <class T>
struct LinearArgs {
  const T* x;
  const uint8_t* packed;
  tile::ScaleView scales;
  tile::CodeView code;
  int64_t m, n, k;
  tile::LoraOperands<T> lora;  // rank 0: no LoRA
  tile::LinearOutput<T> out;
  int64_t token_tiles;         // CTAs along m
  int64_t segments_per_split;  // a multiple of the tile's kStageSegments
};

// The shared addresses of a lane's operands in slot 0, segment 0.
template <class Tile>
struct LaneAddresses {
  uint32_t table, lane_offset;
  uint32_t packed, x_low, x_high, scales;
  int g;

  __device__ __forceinline__ LaneAddresses(uint32_t shared, int warp_row, int lane)
      : table(shared + Tile::kTable), lane_offset(4 * (lane % Tile::kTableCopies)), g(lane / 4) {
    const int t = lane % 4;
    packed = shared + Tile::kPacked + warp_row * Tile::kPackedRowStride + 8 * t;
    x_low = shared + Tile::kX + Tile::x_offset(g, 0, 2 * t);
    x_high = shared + Tile::kX + Tile::x_offset(g, 0, 2 * t + 1);
    scales = shared + Tile::kScales + warp_row * tile::kPairTableEntryBytes;
  }
};

template <class Tile>
using WeightOperands = uint32_t[Tile::kRowTiles][4][4];  // [tile][step][mma operand register]

// Decodes one segment of a warp's rows with scales and offsets. Its first group of columns has index `scale_group`
// among those staged.
template <class Tile, bool kFused>
__device__ __forceinline__ void decode_scaled_segment(const LaneAddresses<Tile>& lane, int slot, int segment,
                                                      int scale_group, WeightOperands<Tile>& w) {
  const int t = threadIdx.x % 4;
  const uint32_t copy = threadIdx.x % 16 * 8;
  const uint32_t packed = lane.packed + slot * Tile::kStagePackedBytes + Tile::packed_offset(lane.g, segment);
  const uint32_t scales = lane.scales + Tile::scale_offset(lane.g, scale_group + 16 * t / Tile::kScaleColumns);
  tile::unroll<2 * Tile::kRowTiles>([&](auto half) {  // rows g, then rows g + 8 of each tile
    constexpr int i = half / 2, upper = half % 2, row = 8 * half;
    const uint2 bytes = ptx::load_shared_v2<row * Tile::kPackedRowStride>(packed);
    const float2 scale = ptx::load_shared_v2_f32<row * tile::kPairTableEntryBytes>(scales);
    tile::unroll<4>([&](auto byte) {
      constexpr int step = byte / 2, a = upper + 2 * (byte % 2);
      const auto decode = [&](uint32_t codes) {
        const float2 value = tile::lookup_pair_f32<byte>(lane.table, copy, codes);
        return ptx::pack2<typename Tile::T>(tile::scale_and_add<kFused>(value.x, scale.x, scale.y),
                                            tile::scale_and_add<kFused>(value.y, scale.x, scale.y));
      };
      w[i][step][a] = decode(bytes.x);
      w[i][step + 2][a] = decode(bytes.y);
    });
  });
}

// Calls use(j, low, high) for each tile j of 8 tokens, with the lane's operands of its segment of x.
template <class Tile, class Use>
__device__ __forceinline__ void for_each_token_tile(const LaneAddresses<Tile>& lane, int slot, int segment,
                                                    const Use& use) {
  const uint32_t x = slot * Tile::kStageXBytes + segment * Tile::kTokens * Tile::kXLineStride;
  const uint32_t x_low = lane.x_low + x, x_high = lane.x_high + x;
  tile::unroll<Tile::kTokenTiles>([&](auto j) {
    use(j, ptx::load_shared_v4<j * 8 * Tile::kXLineStride>(x_low),
        ptx::load_shared_v4<j * 8 * Tile::kXLineStride>(x_high));
  });
}

template <class Tile>
using Accumulators = float[Tile::kRowTiles][Tile::kTokenTiles][4];

// Adds one segment's product to acc: segment `segment` of the stage in buffer `slot`. Its scales have index
// `scale_segment` among those staged.
template <class Tile>
__device__ __forceinline__ void multiply_segment(const LaneAddresses<Tile>& lane, int slot, int segment,
                                                 int scale_segment, Accumulators<Tile>& acc) {
  using T = typename Tile::T;
  WeightOperands<Tile> w;
  float scale[Tile::kRowTiles][2];
  const uint32_t packed = lane.packed + slot * Tile::kStagePackedBytes + Tile::packed_offset(lane.g, segment);
  const uint32_t scales = lane.scales + Tile::scale_offset(lane.g, scale_segment);
  tile::unroll<2 * Tile::kRowTiles>([&](auto half) {  // rows g, then rows g + 8 of each tile
    constexpr int i = half / 2, upper = half % 2, row = 8 * half;
    const uint2 bytes = ptx::load_shared_v2<row * Tile::kPackedRowStride>(packed);
    if constexpr (Tile::kZeroPoints) {
      const float2 block = ptx::load_shared_v2_f32<row * tile::kPairTableEntryBytes>(scales);
      scale[i][upper] = block.x;
      tile::unroll<2>([&](auto word) {
        uint32_t pairs[4];
        tile::IntegerPairs<T>::decode(word == 0 ? bytes.x : bytes.y, __float_as_uint(block.y), pairs);
        w[i][2 * word][upper] = pairs[0], w[i][2 * word][upper + 2] = pairs[1];
        w[i][2 * word + 1][upper] = pairs[2], w[i][2 * word + 1][upper + 2] = pairs[3];
      });
      return;
    }
    scale[i][upper] = ptx::load_shared_f32<row * tile::kPairTableEntryBytes>(scales);
    w[i][0][upper] = tile::lookup_pair<0>(lane.table, lane.lane_offset, bytes.x);
    w[i][0][upper + 2] = tile::lookup_pair<1>(lane.table, lane.lane_offset, bytes.x);
    w[i][1][upper] = tile::lookup_pair<2>(lane.table, lane.lane_offset, bytes.x);
    w[i][1][upper + 2] = tile::lookup_pair<3>(lane.table, lane.lane_offset, bytes.x);
    w[i][2][upper] = tile::lookup_pair<0>(lane.table, lane.lane_offset, bytes.y);
    w[i][2][upper + 2] = tile::lookup_pair<1>(lane.table, lane.lane_offset, bytes.y);
    w[i][3][upper] = tile::lookup_pair<2>(lane.table, lane.lane_offset, bytes.y);
    w[i][3][upper + 2] = tile::lookup_pair<3>(lane.table, lane.lane_offset, bytes.y);
  });

  for_each_token_tile(lane, slot, segment, [&](auto j, uint4 low, uint4 high) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      float sum[4];
      ptx::mma_m16n8k16_first<T>(sum, w[i][0][0], w[i][0][1], w[i][0][2], w[i][0][3], low.x, low.y);
      ptx::mma_m16n8k16<T>(sum, w[i][1][0], w[i][1][1], w[i][1][2], w[i][1][3], low.z, low.w);
      ptx::mma_m16n8k16<T>(sum, w[i][2][0], w[i][2][1], w[i][2][2], w[i][2][3], high.x, high.y);
      ptx::mma_m16n8k16<T>(sum, w[i][3][0], w[i][3][1], w[i][3][2], w[i][3][3], high.z, high.w);
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[i][j][c] = fmaf(scale[i][c / 2], sum[c], acc[i][j][c]);
    }
  });
}

// The same, with weights that are decoded with scales and offsets.
template <class Tile>
__device__ __forceinline__ void multiply_scaled_segment(const LaneAddresses<Tile>& lane, bool fused, int slot,
                                                        int segment, int scale_segment, Accumulators<Tile>& acc) {
  using T = typename Tile::T;
  WeightOperands<Tile> w;
  const int scale_group = scale_segment * (tile::kSegment / Tile::kScaleColumns);
  if (fused)
    decode_scaled_segment<Tile, true>(lane, slot, segment, scale_group, w);
  else
    decode_scaled_segment<Tile, false>(lane, slot, segment, scale_group, w);
  for_each_token_tile(lane, slot, segment, [&](auto j, uint4 low, uint4 high) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      ptx::mma_m16n8k16<T>(acc[i][j], w[i][0][0], w[i][0][1], w[i][0][2], w[i][0][3], low.x, low.y);
      ptx::mma_m16n8k16<T>(acc[i][j], w[i][1][0], w[i][1][1], w[i][1][2], w[i][1][3], low.z, low.w);
      ptx::mma_m16n8k16<T>(acc[i][j], w[i][2][0], w[i][2][1], w[i][2][2], w[i][2][3], high.x, high.y);
      ptx::mma_m16n8k16<T>(acc[i][j], w[i][3][0], w[i][3][1], w[i][3][2], w[i][3][3], high.z, high.w);
    }
  });
}

// The parts of a tile's sum and the warp groups take turns at the LoRA steps.
template <class Tile, bool kStack, class T>
__device__ __forceinline__ void add_lora(const tile::LoraOperands<T>& lora, tile::KPart part, int64_t row0,
                                         int64_t token0, int group, Accumulators<Tile>& acc) {
  const bool vector = lora.rank % 4 == 0 && (reinterpret_cast<uintptr_t>(lora.b) & 7) == 0;
  const auto add = [&](int64_t step) {
    if (vector)
      tile::lora_step<T, true>(lora, row0, token0, step, acc);
    else
      tile::lora_step<T, false>(lora, row0, token0, step, acc);
  };
  tile::for_lora_steps<kStack>(lora.rank, lora.adapter_ranks, part.index * Tile::kWarpsK + group,
                               part.count * Tile::kWarpsK, add);
}

// Computes the tile of rows n0.. of w and tokens token0.. of x, over a slice of k. This is the work of a whole CTA.
// Requires k % 64 == 0, a block size of at least kScaleColumns, no offsets if that is 64, except zero points of an
// integer code with kZeroPoints, and x and packed aligned to 16 bytes. kStack: LoRA may be a stack of several adapters.
template <class Tile, bool kStack = true, class Slice>
__device__ __forceinline__ void linear_nf4_tile(const LinearArgs<typename Tile::T>& p, int64_t n0, int64_t token0,
                                                const Slice& slice) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory);
  const auto scale_value_at = [](int code) {
    return reinterpret_cast<float*>(shared_memory + Tile::scale_value_offset(code));
  };
  const int warp = threadIdx.x / 32, group = warp / Tile::kWarpsN;
  const int warp_row = warp % Tile::kWarpsN * (16 * Tile::kRowTiles);
  const int64_t segment0 = slice.segment0;
  const int segments = slice.segments;
  const int stages = (segments + Tile::kStageSegments - 1) / Tile::kStageSegments;

  tile::LinearStages<Tile> source(shared, p.x, p.packed, token0, p.m, n0, p.n, p.k, segment0, segments);
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) source.fetch(stage, stage);
  tile::ScaleStage<Tile, Tile::kScaleSegments, Tile::kScaleColumns> scales(p.scales, p.code, n0, p.n, p.k);
  scales.load(segment0, segments);
  if constexpr (Tile::kScalesWeights)
    tile::fill_pairs_f32<Tile::kThreads>(reinterpret_cast<char*>(shared_memory) + Tile::kTable, p.code);
  else if constexpr (!Tile::kZeroPoints)
    tile::fill_pair_table<typename Tile::T, Tile::kThreads, Tile::kTableCopies>(shared + Tile::kTable, p.code);
  tile::fill_scale_values_at<Tile::kThreads>(p.scales, scale_value_at);
  Accumulators<Tile> acc = {};
  ptx::wait_for_previous_grid();  // which computes h, and clears the tickets
  add_lora<Tile, kStack>(p.lora, slice.part(), n0 + warp_row, token0, group, acc);

  const LaneAddresses<Tile> lane(shared, warp_row, threadIdx.x % 32);
  [[maybe_unused]] const bool fused = Tile::kScalesWeights && tile::fuses_offset(p.scales);
  int slot = 0;
  for (int stage = 0; stage < stages; ++stage) {
    if (stage % Tile::kStagesPerScales == 0) {
      __syncthreads();  // the tables are complete, and the previous scales no longer in use
      scales.store(shared + Tile::kScales, scale_value_at);
      const int after = stage * Tile::kStageSegments + Tile::kScaleSegments;
      if (after < segments) scales.load(segment0 + after, segments - after);
    }
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this stage is complete, and the previous stage's buffer is free
    source.fetch(stage + Tile::kStages - 1, slot == 0 ? Tile::kStages - 1 : slot - 1);
#pragma unroll
    for (int i = 0; i < Tile::kStageSegments / Tile::kWarpsK; ++i) {
      const int segment = i * Tile::kWarpsK + group, number = stage * Tile::kStageSegments + segment;
      if (number >= segments) continue;
      if constexpr (Tile::kScalesWeights)
        multiply_scaled_segment(lane, fused, slot, segment, number % Tile::kScaleSegments, acc);
      else
        multiply_segment(lane, slot, segment, number % Tile::kScaleSegments, acc);
    }
    slot = slot == Tile::kStages - 1 ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the sums may now overwrite the stages

  tile::store_sums<Tile>(shared, warp_row, group, acc);
  __syncthreads();
  tile::finish<Tile>(p.out, slice, reinterpret_cast<float*>(shared_memory), token0, p.m, n0, p.n);
}

// Grid: x over token tiles (fastest) and row tiles, y over splits of k.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_kernel(const __grid_constant__ LinearArgs<typename Tile::T> p) {
  if constexpr (Tile::kSharedBytes <= tile::kMostSharedBytes)
    linear_nf4_tile<Tile>(p, blockIdx.x / p.token_tiles * Tile::kRows, blockIdx.x % p.token_tiles * Tile::kTokens,
                          tile::SplitSlice(p.k, p.segments_per_split));
}

// Grid: a stream over token tiles (fastest) and row tiles.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_stream_kernel(const __grid_constant__ LinearArgs<typename Tile::T> p,
                             const __grid_constant__ tile::KStream stream) {
  if constexpr (tile::kArchStreams) {
    tile::StreamSlice slice(stream);
    while (true) {
      const int64_t tile = slice.tile();
      linear_nf4_tile<Tile>(p, tile / p.token_tiles * Tile::kRows, tile % p.token_tiles * Tile::kTokens, slice);
      if (!slice.next()) break;
      __syncthreads();  // the next tile's stages overwrite the sums
    }
  }
}

}  // namespace qlora::kernels
