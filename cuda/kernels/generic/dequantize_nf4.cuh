// dequantize_nf4: decodes packed codes of 4 bits or more, scales and offsets to values, float32(float32(value * scale)
// + offset) or (value - zero point) * scale, rounded once. The same launch decodes nested scales.
//
// A warp takes one chunk of kSweeps sweeps after another. In a sweep, each of its 32 lanes decodes 16 bytes of output.
// A chunk touches at most 32 quantization blocks, so lane i loads and decodes the scale of block i, and the other lanes
// get it by shuffle. Each scale is read once, and the loads cover whole sectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/grouped.h"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/load.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/code_tables.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/lane_values.cuh"
#include "cuda/tile/generic/nf4_decode.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/generic/wide_codes.cuh"

namespace qlora::kernels {

inline constexpr int kDequantizeRun = 2;  // consecutive chunks per warp

template <class T, int kChunk>
struct DequantizeTile {
  static constexpr int kPerLane = tile::LaneValues<T>::kCount;
  static constexpr int kSweep = tile::kWarp * kPerLane;  // values
  static constexpr int kSweeps = kChunk / kSweep;
};

template <class T>
__device__ __forceinline__ uint4 round_lane(const float (&v)[tile::LaneValues<T>::kCount]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  } else {
    return make_uint4(ptx::pack2<T>(v[0], v[1]), ptx::pack2<T>(v[2], v[3]), ptx::pack2<T>(v[4], v[5]),
                      ptx::pack2<T>(v[6], v[7]));
  }
}

// What a warp needs besides the chunk: the CTA's tables, and the lane's nested absmax, which it keeps from chunk to
// chunk.
struct DequantizeState {
  const float* values;
  const float* scale_values;
  float offset;
  tile::RawScale raw;
};

// Returns whether the kChunk elements from `first` on touch no more quantization blocks than a warp has lanes.
template <int kChunk>
__device__ __forceinline__ bool a_lane_a_block(const tile::ScaleView& scales, int64_t first) {
  return (first + kChunk - 1 >> scales.block_shift) - (first >> scales.block_shift) < tile::kWarp;
}

// What a value goes through. All of these give the bits of BlockDecoder.
enum class DequantizeSteps {
  kScale,            // value * scale
  kScaleThenAdd,     // value * scale + offset
  kScaleAndAdd,      // the same, where the product is exact: one instruction
  kSubtractInteger,  // (q - zero point) * scale for integers q, of 4 bits without a table
};

// Calls use(steps) with a constant. Returns false, and calls nothing, for zero points of any other code.
template <bool kWide, class Use>
__device__ __forceinline__ bool with_dequantize_steps(const tile::ScaleView& scales, const tile::CodeView& code,
                                                      const Use& use) {
  using enum DequantizeSteps;
  if (!scales.scales.offsets)
    use(std::integral_constant<DequantizeSteps, kScale>{});
  else if (!tile::has_zero_points(scales) && scales.exact_products)
    use(std::integral_constant<DequantizeSteps, kScaleAndAdd>{});
  else if (!tile::has_zero_points(scales))
    use(std::integral_constant<DequantizeSteps, kScaleThenAdd>{});
  else if (kWide || code.is_integer())
    use(std::integral_constant<DequantizeSteps, kSubtractInteger>{});
  else
    return false;
  return true;
}

// Decodes the kChunk elements from `first` on into `out`. Requires alignment for vector accesses, and a_lane_a_block.
template <class T, int kChunk, bool kReadSoon, bool kWide, DequantizeSteps kSteps>
__device__ __forceinline__ void dequantize_chunk(const uint8_t* packed, const tile::ScaleView& scales,
                                                 const tile::CodeView& code, int64_t first, T* out,
                                                 DequantizeState& state) {
  constexpr bool kHasOffsets = kSteps != DequantizeSteps::kScale;
  using Tile = DequantizeTile<T, kChunk>;
  const int lane = threadIdx.x % tile::kWarp;
  const uint8_t* const in = packed + ((first + lane * Tile::kPerLane) >> 1);
  std::conditional_t<kWide, tile::WideRun<Tile::kPerLane>, uint32_t> word[Tile::kSweeps];
  tile::unroll<Tile::kSweeps>([&](auto r) {
    constexpr int kOffset = r * Tile::kSweep / 2;
    if constexpr (kWide) {
      word[r].load(packed, first + lane * Tile::kPerLane + r * Tile::kSweep, code.wide.bits);
    } else if constexpr (Tile::kPerLane == 8) {
      word[r] = ptx::load_stream_u32<kOffset>(in);
    } else {
      word[r] = ptx::load_stream_u16<kOffset>(in);
    }
  });

  const int64_t block = (first >> scales.block_shift) + lane;
  tile::RawOffset raw_offset;
  if (block <= (first + kChunk - 1) >> scales.block_shift) {
    tile::reload_scale(scales, block, state.raw);
    if constexpr (kHasOffsets) raw_offset = tile::load_offset(scales, block);
  }
  const float own = tile::decode_scale(scales, state.raw, state.scale_values, state.offset);
  float own_offset = 0.0f;
  if constexpr (kWide && kSteps == DequantizeSteps::kSubtractInteger)
    own_offset = static_cast<float>(raw_offset.bits);
  else if constexpr (kSteps == DequantizeSteps::kSubtractInteger)
    own_offset = 0x1p23f - code.first_integer() + static_cast<float>(raw_offset.bits);  // subtracted from 2^23 + q
  else if constexpr (kHasOffsets)
    own_offset = tile::decode_offset(scales, raw_offset);

  const uint32_t table = ptx::shared_address(state.values);
  T* const to = out + lane * Tile::kPerLane;
  const int in_block = static_cast<int>(first & ((int64_t{1} << scales.block_shift) - 1)) + lane * Tile::kPerLane;
  tile::unroll<Tile::kSweeps>([&](auto r) {
    const int owner = (in_block + r * Tile::kSweep) >> scales.block_shift;
    const float scale = __shfl_sync(0xFFFFFFFFu, own, owner);
    float value[Tile::kPerLane];
    [[maybe_unused]] float offset = 0.0f;
    if constexpr (kHasOffsets) offset = __shfl_sync(0xFFFFFFFFu, own_offset, owner);
    if constexpr (kWide)
      word[r].decode(value, code.wide.bits, state.values, [&](float v) {
        if constexpr (kSteps == DequantizeSteps::kScale) return __fmul_rn(v, scale);
        if constexpr (kSteps == DequantizeSteps::kSubtractInteger) return __fmul_rn(__fsub_rn(v, offset), scale);
        return tile::scale_and_add<false>(v, scale, offset);
      });
    else if constexpr (kSteps == DequantizeSteps::kSubtractInteger)
      tile::decode_integers(value, word[r], [&](float v) { return __fmul_rn(v - offset, scale); });
    else if constexpr (kSteps == DequantizeSteps::kScale)
      tile::decode_nf4(value, word[r], table, [&](float v) { return __fmul_rn(v, scale); });
    else
      tile::decode_nf4(value, word[r], table, [&](float v) {
        return tile::scale_and_add<kSteps == DequantizeSteps::kScaleAndAdd>(v, scale, offset);
      });
    if constexpr (kReadSoon)
      ptx::store_v4<r * tile::kWarp * 16>(to, round_lane<T>(value));
    else
      ptx::store_stream_v4<r * tile::kWarp * 16>(to, round_lane<T>(value));
  });
}

// Decodes the elements first .. end - 1, at most kChunk, one at a time: the end of the tensor, and data too poorly
// aligned for vector accesses.
template <class T, bool kWide>
__device__ __forceinline__ void dequantize_elements(const uint8_t* packed, const tile::ScaleView& scales,
                                                    const tile::CodeView& code, int64_t first, int64_t end, T* out,
                                                    const DequantizeState& state) {
#pragma unroll 1
  for (int64_t i = first + threadIdx.x % tile::kWarp; i < end; i += tile::kWarp) {
    const int64_t block = i >> scales.block_shift;
    const float scale = tile::read_scale(scales, block, state.scale_values, state.offset);
    const float value = state.values[kWide ? code_at(packed, i, code.wide.bits) : code_at(packed, i)];
    out[i - first] = tile::narrow<T>(scales.scales.offsets ? tile::BlockDecoder(scales, block, scale)(value)
                                                           : __fmul_rn(value, scale));
  }
}

// The part of the tensor to decode: `rows` pieces of `columns` elements. The first begins at element `first`, and each
// next one `stride` elements later. A piece has `chunks` chunks, and the last of them may be short.
struct DequantizePieces {
  int64_t first, rows, columns, stride, chunks;
  int64_t out_stride;  // from piece to piece
};

// Terms that extend a decoded panel: values, then bias, then zeros.
template <class T>
struct DequantizeTerms {
  uint32_t terms, columns;  // columns of the matmul's output; their product is less than 2^31, as panels are small
  const T* values;          // term t < rank of column c at values[t * term_stride + c * column_stride]
  int64_t rank, term_stride, column_stride;
  const T* bias;  // term `rank` of each column, or null
  T* out;         // term t of column c at out[t * out_term_stride + c * out_column_stride]
  int64_t out_term_stride, out_column_stride;
};

template <class T, int kThreads>
__device__ __forceinline__ void append_terms(const DequantizeTerms<T>& p) {
  const uint32_t count = p.terms * p.columns;
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const bool neighbours = p.out_term_stride == 1;  // a column's terms
    const uint32_t divisor = neighbours ? p.terms : p.columns, quotient = i / divisor, remainder = i % divisor;
    const uint32_t term = neighbours ? remainder : quotient, column = neighbours ? quotient : remainder;
    T value{};
    if (term < p.rank)
      value = p.values[term * p.term_stride + column * p.column_stride];
    else if (term == p.rank && p.bias != nullptr)
      value = p.bias[column];
    p.out[term * p.out_term_stride + column * p.out_column_stride] = value;
  }
}

// The CTAs of a row of the grid loop over the chunks, so that each CTA stages the tables only once, however large the
// tensor is. A warp takes kDequantizeRun neighbouring chunks at a time, because most of them share a nested block.
template <class T, int kChunk, int kThreads, bool kReadSoon, bool kWide>
__device__ __forceinline__ void dequantize_pieces(const uint8_t* __restrict__ packed, const tile::ScaleView& scales,
                                                  const tile::CodeView& code, const DequantizePieces& pieces,
                                                  T* __restrict__ out) {
  __shared__ __align__(tile::kNf4DecodeAlign) float values[tile::kStagedValues<kWide>];
  __shared__ float scale_values[256];
  __shared__ float shared_offset;
  tile::stage_values(values, code);
  tile::fill_scale_values<kThreads>(scales, scale_values);
  if (threadIdx.x == 0) shared_offset = tile::nested_offset(scales);
  __syncthreads();

  constexpr int kPerVector = DequantizeTile<T, kChunk>::kPerLane;
  DequantizeState state{values, scale_values, shared_offset, {}};
  const bool aligned = tile::is_aligned<kWide ? 8 : 4>(packed) && tile::is_aligned<16>(out) && pieces.first % 8 == 0 &&
                       (pieces.rows == 1 || (pieces.stride % 8 == 0 && pieces.columns % kPerVector == 0 &&
                                             pieces.out_stride % kPerVector == 0));
  const int64_t warps = int64_t{gridDim.x} * (kThreads / tile::kWarp);
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / tile::kWarp;
  const auto decode_all = [&](auto in_chunks, auto steps) {
#pragma unroll 1
    for (int64_t chunk = warp * kDequantizeRun; chunk < pieces.rows * pieces.chunks;) {
      const int64_t row = pieces.rows == 1 ? 0 : chunk / pieces.chunks;
      const int64_t column = (chunk - row * pieces.chunks) * kChunk;
      const int64_t first = pieces.first + row * pieces.stride + column;
      T* const to = out + row * pieces.out_stride + column;
      if (in_chunks && column + kChunk <= pieces.columns && a_lane_a_block<kChunk>(scales, first)) {
        dequantize_chunk<T, kChunk, kReadSoon, kWide, steps>(packed, scales, code, first, to, state);
      } else {
        const int64_t count = min(pieces.columns - column, int64_t{kChunk});
        dequantize_elements<T, kWide>(packed, scales, code, first, first + count, to, state);
      }
      ++chunk;
      if (chunk % kDequantizeRun == 0) chunk += (warps - 1) * kDequantizeRun;
    }
  };
  if (!aligned || !with_dequantize_steps<kWide>(scales, code, [&](auto steps) { decode_all(std::true_type{}, steps); }))
    decode_all(std::false_type{}, std::integral_constant<DequantizeSteps, DequantizeSteps::kScale>{});
}

template <class T, int kChunk, int kThreads, bool kReadSoon, bool kWide>
__global__ __launch_bounds__(kThreads) void dequantize_nf4_kernel(const uint8_t* __restrict__ packed,
                                                                  const __grid_constant__ tile::ScaleView scales,
                                                                  const __grid_constant__ tile::CodeView code,
                                                                  const __grid_constant__ DequantizePieces pieces,
                                                                  const __grid_constant__ DequantizeTerms<T> terms,
                                                                  T* __restrict__ out) {
  if constexpr (kReadSoon) append_terms<T, kThreads>(terms);
  dequantize_pieces<T, kChunk, kThreads, kReadSoon, kWide>(packed, scales, code, pieces, out);
}

// CTAs per SM. Without this bound, the compiler saves registers for six on cards with 1536 threads per SM, and spills.
inline constexpr int kGroupedDequantizeCtas = 4;

// Decodes the same pieces of each expert's weight to out [experts, rows, columns]. The grid has one row of CTAs per
// expert. Experts without tokens are skipped.
template <class T, int kChunk, int kThreads, bool kWide>
__global__ __launch_bounds__(kThreads, kGroupedDequantizeCtas) void grouped_dequantize_nf4_kernel(
    const uint8_t* __restrict__ packed, const __grid_constant__ tile::ScaleView scales,
    const __grid_constant__ tile::CodeView code, const __grid_constant__ DequantizePieces pieces,
    const __grid_constant__ WeightStride stride, const int64_t* __restrict__ offsets, T* __restrict__ out) {
  const int64_t expert = blockIdx.y;
  if (offsets[expert] <= (expert == 0 ? 0 : offsets[expert - 1])) return;
  tile::ScaleView own = scales;
  own.scales = expert_scales(scales.scales, stride, expert);
  dequantize_pieces<T, kChunk, kThreads, true, kWide>(packed + expert * stride.packed_bytes, own, code, pieces,
                                                      out + expert * pieces.rows * pieces.columns);
}

}  // namespace qlora::kernels
