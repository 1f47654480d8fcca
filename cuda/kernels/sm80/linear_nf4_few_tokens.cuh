// y = x · wᵀ + h · lora_bᵀ + bias for few tokens, including h, on tensor cores, straight from the packed weight. The
// pair table decodes it to registers, and the accumulators are float32. cuda/tile/sm80/few_tokens_tile.cuh describes
// the tile shapes and layouts.
//
// The scale of a quantization block is never applied to a weight: each segment is summed from zero, and then acc +=
// scale · sum. Zero points of integer codes are subtracted from the codes, which is exact.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm80/few_tokens_copy.cuh"
#include "cuda/tile/sm80/few_tokens_lora.cuh"
#include "cuda/tile/sm80/few_tokens_tile.cuh"
#include "cuda/tile/sm80/integer_pairs.cuh"
#include "cuda/tile/sm80/k_slices.cuh"
#include "cuda/tile/sm80/linear_sum.cuh"
#include "cuda/tile/sm80/pair_registers.cuh"
#include "cuda/tile/sm80/scale_stage.cuh"

namespace qlora::kernels {

template <class T>
struct FewTokensLinearArgs {
  const T* x;
  const uint8_t* packed;
  tile::ScaleView scales;
  tile::CodeView code;
  int64_t m, n, k;
  tile::FewTokensLora<T> lora;  // rank 0: no LoRA
  tile::LinearOutput<T> out;
  int64_t segments_per_split;  // a multiple of the tile's kRoundSegments
};

template <class Tile>
using FewTokensAccumulators =
    float[Tile::kRowTiles][Tile::kTokenTiles][2];  // rows g and g + 8 of each 16, token t of each 4

// A lane's x of a unit. It stays zero if the lane's segment is not the column's, or the column's token does not exist.
template <class Tile>
class XUnit {
 public:
  uint4 value[Tile::kTokenTiles][4] = {};

  __device__ __forceinline__ explicit XUnit(int tokens)
      : offset_(Tile::x_offset(token(), segment(), 4 * (threadIdx.x % 2))),
        left_(segment() == column() ? tokens - token() : 0) {
    ptx::hold(offset_), ptx::hold(left_);
  }

  // `x` is the address of the unit's first segment in its stage.
  __device__ __forceinline__ void load(uint32_t x) {
    const uint32_t from = x + offset_;
    tile::unroll<Tile::kTokenTiles>([&](auto j) {
      if (4 * j >= left_) return;
      tile::unroll<4>(
          [&](auto q) { value[j][q] = ptx::load_shared_v4<4 * j * tile::kPairTableEntryBytes>(from ^ (q * 16)); });
    });
  }

 private:
  __device__ __forceinline__ static int token() { return threadIdx.x % 32 / 8; }
  // The segment that the lane holds, and the segment that its column is for.
  __device__ __forceinline__ static int segment() { return threadIdx.x % 4 / 2; }
  __device__ __forceinline__ static int column() { return threadIdx.x % 32 / 4 % 2; }

  uint32_t offset_;
  int left_;  // the number of tokens from this lane's first on
};

// Decodes packed bytes to weights. Most words go through the table in shared memory. One word in eight is decoded in
// registers, which lowers the time for shared memory to that of an H100's other limits.
template <class T>
class TableDecoder {
 public:
  __device__ __forceinline__ TableDecoder(uint32_t table, const tile::CodeView& code)
      : table_(table), lane_offset_(4 * (threadIdx.x % 32)), registers_(code) {
    ptx::hold(lane_offset_);
  }

  template <bool kInRegisters>
  __device__ __forceinline__ void decode(uint32_t word, uint32_t, uint32_t (&pairs)[4]) const {
    if constexpr (kInRegisters)
      registers_.decode(word, pairs);
    else
      tile::unroll<4>([&](auto i) { pairs[i] = tile::lookup_pair<i>(table_, lane_offset_, word); });
  }

 private:
  uint32_t table_, lane_offset_;
  tile::PairRegisters<T> registers_;
};

// The same for integers less a zero point.
template <class T>
struct IntegerDecoder {
  __device__ __forceinline__ IntegerDecoder(uint32_t, const tile::CodeView&) {}

  template <bool>
  __device__ __forceinline__ void decode(uint32_t word, uint32_t minuend, uint32_t (&pairs)[4]) const {
    tile::IntegerPairs<T>::decode(word, minuend, pairs);
  }
};

template <class Tile>
using Decoder = std::conditional_t<Tile::kZeroPoints, IntegerDecoder<typename Tile::T>, TableDecoder<typename Tile::T>>;

// Adds the unit's product to acc, for tile `kTile` of 16 rows. `scales` is the address of row g's first scale.
template <class Tile, int kTile>
__device__ __forceinline__ void multiply_rows(const Decoder<Tile>& decoder, const uint4 (&w)[2], const XUnit<Tile>& x,
                                              uint32_t scales, FewTokensAccumulators<Tile>& acc) {
  using T = typename Tile::T;
  constexpr int kRowBytes = Tile::kStageSegments * 4, kLow = 16 * kTile * kRowBytes, kHigh = kLow + 8 * kRowBytes;
  const float2 low = ptx::load_shared_v2_f32<kLow>(scales);
  const float2 high = ptx::load_shared_v2_f32<kHigh>(scales);
  uint32_t minuend0 = 0, minuend1 = 0;
  if constexpr (Tile::kZeroPoints) {  // of the lane's segment
    const uint32_t minuends = scales + Tile::kMinuends + threadIdx.x % 4 / 2 * 4;
    minuend0 = ptx::load_shared_u32<kLow>(minuends), minuend1 = ptx::load_shared_u32<kHigh>(minuends);
  }
  float sum[Tile::kTokenTiles][4];
  tile::unroll<4>([&](auto q) {
    const uint4 &w0 = w[0], &w1 = w[1];
    const uint32_t bytes0 = q == 0 ? w0.x : q == 1 ? w0.y : q == 2 ? w0.z : w0.w;
    const uint32_t bytes1 = q == 0 ? w1.x : q == 1 ? w1.y : q == 2 ? w1.z : w1.w;
    uint32_t row0[4], row1[4];  // the pairs of rows g and g + 8
    decoder.template decode<false>(bytes0, minuend0, row0);
    decoder.template decode<q == 3>(bytes1, minuend1, row1);
    tile::unroll<Tile::kTokenTiles>([&](auto j) {
      const uint4& v = x.value[j][q];
      if constexpr (q == 0)
        ptx::mma_m16n8k16_first<T>(sum[j], row0[0], row1[0], row0[1], row1[1], v.x, v.y);
      else
        ptx::mma_m16n8k16<T>(sum[j], row0[0], row1[0], row0[1], row1[1], v.x, v.y);
      ptx::mma_m16n8k16<T>(sum[j], row0[2], row1[2], row0[3], row1[3], v.z, v.w);
    });
  });
#pragma unroll
  for (int j = 0; j < Tile::kTokenTiles; ++j) {
    acc[kTile][j][0] = fmaf(low.y, sum[j][1], fmaf(low.x, sum[j][0], acc[kTile][j][0]));
    acc[kTile][j][1] = fmaf(high.y, sum[j][3], fmaf(high.x, sum[j][2], acc[kTile][j][1]));
  }
}

// acc += h · lora_bᵀ. Each warp group adds one tile of 16 rows, and row0 is the first row of this group's tile. A
// kernel that computes h itself has its slice's part of h at `h`. If h is given, the parts of the sum divide the ranks.
template <class Tile>
__device__ __forceinline__ void add_lora(const FewTokensLinearArgs<typename Tile::T>& p, uint32_t h, tile::KPart part,
                                         int64_t row0, int group, FewTokensAccumulators<Tile>& acc) {
  using T = typename Tile::T;
  const auto& lora = p.lora;
  const int tokens = static_cast<int>(p.m);
  const bool folded = lora.a != nullptr, vector = lora.rank % 4 == 0;
  const auto h4 = [&](int token, int64_t rank, int part) {
    if (folded)
      return ptx::load_shared_v4_f32(h + part * Tile::kHSumBytes +
                                     (token * Tile::kHSumStride + static_cast<int>(rank)) * 4);
    if (part == 1) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // a 16-bit h fits a tf32
    const T* of = lora.h + token * lora.rank;
    const uint2 ranks = vector ? tile::load_4_ranks<T, true>(of, rank, lora.rank, true)
                               : tile::load_4_ranks<T, false>(of, rank, lora.rank, true);
    const float2 low = ptx::unpack2<T>(ranks.x), high = ptx::unpack2<T>(ranks.y);
    return make_float4(low.x, low.y, high.x, high.y);
  };
  float sum[Tile::kTokenTiles][2] = {};
  tile::for_lora_steps(lora.rank, lora.adapter_ranks, folded ? 0 : part.index, folded ? 1 : part.count,
                       [&](int64_t step) {
                         uint2 b[2];
                         tile::load_lora_b(lora, row0, p.n, step, b);
                         tile::add_h_step<Tile>(b, tokens, step, h4, sum);
                       });
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
    if (group == i)
#pragma unroll
      for (int j = 0; j < Tile::kTokenTiles; ++j) acc[i][j][0] += sum[j][0], acc[i][j][1] += sum[j][1];
}

// Stores a warp's accumulators to shared memory as [group][token][row].
template <class Tile>
__device__ __forceinline__ void store_few_sums(uint32_t shared, int warp_row, int group,
                                               const FewTokensAccumulators<Tile>& acc) {
  const unsigned thread = tile::thread_index();
  const int g = thread % 32 / 4, t = thread % 4;
  const uint32_t to = shared + ((group * Tile::kTokens + t) * Tile::kSumStride + warp_row + g) * 4;
  tile::unroll<Tile::kRowTiles>([&](auto i) {
    tile::unroll<Tile::kTokenTiles>([&](auto j) {
      ptx::store_shared_f32<(4 * j * Tile::kSumStride + 16 * i) * 4>(to, acc[i][j][0]);
      ptx::store_shared_f32<(4 * j * Tile::kSumStride + 16 * i + 8) * 4>(to, acc[i][j][1]);
    });
  });
}

// Computes a row tile over a slice of k. This is the work of a whole CTA. Requires m <= kTokens, k % 64 == 0, a block
// size of at least 64, no offsets, except zero points of an integer code with kZeroPoints, and x, packed and, unless it
// is null, lora_a aligned to 16 bytes.
template <class Tile, class Slice>
__device__ __forceinline__ void linear_nf4_few_tokens_tile(const FewTokensLinearArgs<typename Tile::T>& p,
                                                           const Slice& slice) {
  // From one segment of x to the next in its stage.
  constexpr int kSegmentBytes = Tile::kTokens * tile::kPairTableEntryBytes;
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory);
  const auto scale_value_at = [](int code) {
    return reinterpret_cast<float*>(shared_memory + Tile::kScaleValues) + code;
  };
  const int warp = threadIdx.x / 32, group = warp / Tile::kWarpsN, part = warp % Tile::kWarpsN;
  const int warp_row = part * Tile::kWarpRows, tokens = static_cast<int>(p.m);
  const int64_t n0 = slice.tile() * Tile::kRows, segment0 = slice.segment0;
  const int segments = slice.segments;

  // Issues all loads of the first stage before it waits for any of them.
  const int unit0 = group * Tile::kUnitSegments;
  tile::UnitLoader<Tile> units(p.packed, n0 + warp_row, p.n, p.k, segment0, segments, unit0);
  tile::PackedUnit<Tile> w;
  tile::unroll<Tile::kRowTiles>([&](auto i) { units.template load<i>(w[i]); });
  tile::fetch_x<Tile>(shared + Tile::kX, p.x, tokens, p.k, segment0, segments);
  ptx::cp_async_commit();
  tile::ScaleStage<Tile, Tile::kStageSegments> scales(p.scales, p.code, n0, p.n, p.k);
  scales.load(segment0, segments);
  tile::prefetch_lora_b(p.lora, n0, p.n);
  if constexpr (!Tile::kZeroPoints)
    tile::fill_pair_table<typename Tile::T, Tile::kThreads>(shared + Tile::kTable, p.code);
  tile::fill_scale_values_at<Tile::kThreads>(p.scales, scale_value_at);
  __syncthreads();
  scales.store(shared + Tile::kScales, scale_value_at);

  FewTokensAccumulators<Tile> acc = {};
  XUnit<Tile> x(tokens);
  tile::HSums<Tile> h(p.lora, p.k, segment0, segments, tokens, part);
  const Decoder<Tile> decoder(shared + Tile::kTable, p.code);
  uint32_t lane_scales = shared + Tile::kScales + Tile::scale_offset(warp_row + threadIdx.x % 32 / 4, unit0);
  ptx::hold(lane_scales);
  int buffer = 0;
  for (int first = 0; first < segments; first += Tile::kStageSegments, buffer ^= 1) {
    const int after = first + Tile::kStageSegments;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage's x and scales are complete, and the previous stage's are no longer in use
    if (after < segments) {
      tile::fetch_x<Tile>(shared + Tile::kX + (buffer ^ 1) * Tile::kStageXBytes, p.x, tokens, p.k, segment0 + after,
                          segments - after);
      ptx::cp_async_commit();
      scales.load(segment0 + after, segments - after);
    }
    const uint32_t stage_x = shared + Tile::kX + buffer * Tile::kStageXBytes;
    const uint32_t stage_scales = lane_scales + buffer * Tile::kStageScaleBytes;
#pragma unroll 1
    for (int unit = unit0; unit < Tile::kStageSegments && first + unit < segments; unit += Tile::kRoundSegments) {
      const uint32_t unit_x = stage_x + unit * kSegmentBytes;
      h.load(first + unit + part);
      x.load(unit_x);
      tile::unroll<Tile::kRowTiles>([&](auto i) {
        multiply_rows<Tile, i>(decoder, w[i], x, stage_scales + (unit - unit0) * 4, acc);
        units.template load<i>(w[i]);
      });
      h.multiply(unit_x, first + unit + part);
    }
    if (after < segments) scales.store(shared + Tile::kScales + (buffer ^ 1) * Tile::kStageScaleBytes, scale_value_at);
  }
  __syncthreads();  // the sums may now overwrite the tables and the stages

  if (p.lora.a != nullptr) {
    h.store(shared + Tile::kHSums + warp * Tile::kHSumBytes);
    __syncthreads();
    tile::sum_h<Tile>(shared + Tile::kHSums, tokens, static_cast<int>(p.lora.rank), p.lora.factor);
    __syncthreads();
  } else {
    ptx::wait_for_previous_grid();  // which computes h, and clears the tickets
  }
  if (p.lora.rank > 0) add_lora<Tile>(p, shared + Tile::kHSums, slice.part(), n0 + warp_row + 16 * group, group, acc);
  store_few_sums<Tile>(shared, warp_row, group, acc);
  __syncthreads();
  tile::finish<Tile>(p.out, slice, reinterpret_cast<float*>(shared_memory), 0, p.m, n0, p.n);
}

// Grid: x over row tiles, y over splits of k.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_few_tokens_kernel(const __grid_constant__ FewTokensLinearArgs<typename Tile::T> p) {
  if constexpr (Tile::kTokens <= tile::kMostFewTokens)
    linear_nf4_few_tokens_tile<Tile>(p, tile::SplitSlice(p.k, p.segments_per_split));
}

// Grid: a stream over row tiles.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_few_tokens_stream_kernel(const __grid_constant__ FewTokensLinearArgs<typename Tile::T> p,
                                        const __grid_constant__ tile::KStream stream) {
  if constexpr (tile::kArchStreams) {
    tile::StreamSlice slice(stream);
    while (true) {
      linear_nf4_few_tokens_tile<Tile>(p, slice);
      if (!slice.next()) break;
      __syncthreads();  // the next tile's tables overwrite the sums
    }
  }
}

}  // namespace qlora::kernels
