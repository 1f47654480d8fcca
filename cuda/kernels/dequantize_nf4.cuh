// dequantize_nf4: packed codes and scales -> values, float32(code) * absmax rounded once, nested scales decoded on the
// way.
//
// A warp takes a chunk of kRows rows of 32 lanes; a lane decodes 16 bytes of output a row. A chunk has at most 32
// blocks, so that lane i loads and decodes the scale of block i, once and in whole sectors, and the others get it by
// shuffle.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/load.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/block_scale.cuh"
#include "cuda/tile/code_tables.cuh"
#include "cuda/tile/lane_values.cuh"
#include "cuda/tile/nf4_decode.cuh"

namespace qlora::kernels {

inline constexpr int kDequantizeRun = 2;

template <class T, int kChunk>
struct DequantizeTile {
  static constexpr int kPerLane = tile::LaneValues<T>::kCount;
  static constexpr int kRow = tile::kWarp * kPerLane;
  static constexpr int kRows = kChunk / kRow;
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

// Element i of `v`, as the memory of T.
template <class T>
__device__ __forceinline__ T element(const uint4& v, int i) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word[i]);
  } else {
    return T{static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16))};
  }
}

template <class T, int kChunk, bool kTail>
__device__ __forceinline__ void dequantize_warp(const uint8_t* packed, const tile::ScaleView& scales,
                                                tile::RawScale& raw, int64_t numel, int64_t first, T* out,
                                                const float* dynamic8, float offset, uint32_t table) {
  using Tile = DequantizeTile<T, kChunk>;
  const int lane = threadIdx.x % tile::kWarp;
  const int64_t begin = first + lane * Tile::kPerLane;
  const uint8_t* in = packed + begin / 2;

  uint32_t word[Tile::kRows];
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    if constexpr (kTail) {
      const int64_t left = numel - (begin + r * Tile::kRow);
      word[r] = 0;
#pragma unroll
      for (int i = 0; i < Tile::kPerLane / 2; ++i) {
        if (2 * i < left) word[r] |= uint32_t{in[r * Tile::kRow / 2 + i]} << (8 * i);
      }
    } else if constexpr (Tile::kPerLane == 8) {
      word[r] = ptx::load_stream_u32(in + r * Tile::kRow / 2);
    } else {
      word[r] = ptx::load_stream_u16(in + r * Tile::kRow / 2);
    }
  }

  const int64_t first_block = first >> scales.block_shift;
  const int64_t last_block = ((kTail ? numel : first + kChunk) - 1) >> scales.block_shift;
  if (first_block + lane <= last_block) tile::reload_scale(scales, first_block + lane, raw);
  const float own = tile::decode_scale(scales, raw, dynamic8, offset);

#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int in_chunk = r * Tile::kRow + lane * Tile::kPerLane;
    const float scale = __shfl_sync(0xFFFFFFFFu, own, in_chunk >> scales.block_shift);
    float value[Tile::kPerLane];
    tile::decode_nf4(value, word[r], scale, table);
    const uint4 rounded = round_lane<T>(value);
    T* at = out + begin + r * Tile::kRow;
    if constexpr (kTail) {
      const int64_t left = numel - (begin + r * Tile::kRow);
#pragma unroll
      for (int i = 0; i < Tile::kPerLane; ++i) {
        if (i < left) at[i] = element<T>(rounded, i);
      }
    } else {
      ptx::store_stream_v4(at, rounded);
    }
  }
}

// Grid-stride, so that the tables are staged once a CTA however large the tensor is; a warp takes kDequantizeRun chunks
// in a row, most of which share one nested block.
template <class T, int kChunk, int kThreads>
__global__ __launch_bounds__(kThreads) void dequantize_nf4_kernel(const uint8_t* __restrict__ packed,
                                                                  const __grid_constant__ tile::ScaleView scales,
                                                                  int64_t numel, T* __restrict__ out) {
  __shared__ __align__(tile::kNf4DecodeAlign) float nf4[kCodes];
  __shared__ float dynamic8[256];
  __shared__ float shared_offset;
  tile::stage_table(nf4, tile::c_nf4.value);
  tile::stage_table(dynamic8, tile::c_dynamic8.value);
  if (threadIdx.x == 0) shared_offset = tile::nested_offset(scales);
  __syncthreads();

  const uint32_t table = ptx::shared_address(nf4);
  const float offset = shared_offset;
  const bool aligned = tile::is_aligned<4>(packed) && tile::is_aligned<16>(out);
  const int64_t warps = int64_t{gridDim.x} * (kThreads / tile::kWarp);
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / tile::kWarp;
  tile::RawScale raw;
#pragma unroll 1
  for (int64_t chunk = warp * kDequantizeRun; chunk * kChunk < numel;) {
    const int64_t first = chunk * kChunk;
    if (aligned && first + kChunk <= numel) {
      dequantize_warp<T, kChunk, false>(packed, scales, raw, numel, first, out, dynamic8, offset, table);
    } else {
      dequantize_warp<T, kChunk, true>(packed, scales, raw, numel, first, out, dynamic8, offset, table);
    }
    ++chunk;
    if (chunk % kDequantizeRun == 0) chunk += (warps - 1) * kDequantizeRun;
  }
}

}  // namespace qlora::kernels
