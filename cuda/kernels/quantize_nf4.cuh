// quantize_nf4: w -> packed codes and absmax, bit for bit as cpp/format/nf4.h says.
//
// A warp takes kRows rows of 32 lanes x 16 bytes of w: consecutive, so that each load and each packed store of the warp
// is one run of whole sectors. A block is kGroup neighbouring lanes of one row, or several whole rows.
#pragma once

#include <cstdint>

#include "cpp/format/nf4.h"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/code_tables.cuh"
#include "cuda/tile/lane_values.cuh"

namespace qlora::cuda {

template <class T, int kBlock>
struct QuantizeTile {
  static constexpr int kPerLane = LaneValues<T>::kCount;
  static constexpr int kRow = kWarp * kPerLane;
  static constexpr int kRowsPerBlock = kBlock > kRow ? kBlock / kRow : 1;
  static constexpr int kRows = kRowsPerBlock > 4 ? kRowsPerBlock : 4;  // four 16-byte loads a lane in flight, or more
  static constexpr int kGroup = kBlock < kRow ? kBlock / kPerLane : kWarp;
  static constexpr int kBlocksPerRow = kWarp / kGroup;
  static constexpr int kSpans = kRows / kRowsPerBlock;  // absmax values a lane sees
  static constexpr int kValues = kRows * kRow;          // a warp's share
};

// The lane's codes, packed: nibble n holds element n ^ 1, because an even element is the high half of its byte. `table` is
// the shared address of the Nf4EncodeTable.
template <class T>
__device__ __forceinline__ uint32_t encode_lane(const LaneValues<T>& values, float inverse, uint32_t table) {
  uint32_t codes = 0;
#pragma unroll
  for (int nibble = LaneValues<T>::kCount - 1; nibble >= 0; --nibble) {
    const float q = ptx::mul_bits(values.float_bits(nibble ^ 1), inverse);
    const uint32_t j = ptx::fma_to_bits(q, Nf4EncodeTable::kSlope, Nf4EncodeTable::kShift);
    const uint32_t cell = ptx::and_or(j, Nf4EncodeTable::kOffsetMask, table);
    const float boundary = ptx::load_shared_f32(cell);
    const uint32_t base = ptx::load_shared_u32<Nf4EncodeTable::kCells * 4>(cell);
    codes = codes * 16 + base - ptx::greater_mask(q, boundary);
  }
  return codes;
}

template <class T, int kBlock, bool kTail>
__device__ __forceinline__ void quantize_warp(const T* w, int64_t numel, int64_t first, uint8_t* packed, float* absmax,
                                              uint32_t table) {
  using Tile = QuantizeTile<T, kBlock>;
  constexpr uint32_t kInfinity = 0x7F800000u, kNaN = 0x7FC00000u;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = first + lane * Tile::kPerLane;

  LaneValues<T> values[Tile::kRows];
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const int64_t at = begin + r * Tile::kRow;
    if constexpr (kTail) {
      values[r].load_tail(w + at, numel - at);
    } else {
      values[r].load(w + at);
    }
  }

  uint32_t scale[Tile::kSpans];
#pragma unroll
  for (int s = 0; s < Tile::kSpans; ++s) {
    uint32_t magnitude = 0;
#pragma unroll
    for (int r = 0; r < Tile::kRowsPerBlock; ++r) {
      magnitude = max(magnitude, values[s * Tile::kRowsPerBlock + r].max_magnitude());
    }
#pragma unroll
    for (int step = Tile::kGroup / 2; step; step /= 2) {
      magnitude = max(magnitude, __shfl_xor_sync(0xFFFFFFFFu, magnitude, step));
    }
    scale[s] = magnitude < kInfinity ? magnitude : kNaN;
  }

#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
    const float block_absmax = __uint_as_float(scale[r / Tile::kRowsPerBlock]);
    uint32_t codes = encode_lane<T>(values[r], inverse_absmax(block_absmax), table);
    codes = block_absmax == block_absmax ? codes : 0;  // a block with a NaN or an infinity in it has code 0 everywhere
    const int64_t at = begin + r * Tile::kRow;
    uint8_t* out = packed + at / 2;
    if constexpr (kTail) {
      const int64_t left = numel - at;
#pragma unroll
      for (int i = 0; i < Tile::kPerLane; i += 2) {
        const uint32_t byte = codes >> (i * 4);
        if (i < left) out[i / 2] = static_cast<uint8_t>(i + 1 < left ? byte : (byte & 0xF0u) | kZeroCode);
      }
    } else if constexpr (Tile::kPerLane == 8) {
      ptx::store_stream_u32(out, codes);
    } else {
      ptx::store_stream_u16(out, codes);
    }
  }

  // Each lane of a group writes another span's absmax, so that one store covers the warp's blocks without gaps.
  const int span = lane % Tile::kGroup;
  const int64_t block = first / kBlock + span * Tile::kBlocksPerRow + lane / Tile::kGroup;
  uint32_t mine = scale[0];
#pragma unroll
  for (int s = 1; s < Tile::kSpans; ++s) mine = span == s ? scale[s] : mine;
  if (span < Tile::kSpans && (!kTail || block * kBlock < numel)) absmax[block] = __uint_as_float(mine);
}

template <class T, int kBlock, int kThreads>
__global__ __launch_bounds__(kThreads) void quantize_nf4_kernel(const T* __restrict__ w, int64_t numel,
                                                                uint8_t* __restrict__ packed,
                                                                float* __restrict__ absmax) {
  using Tile = QuantizeTile<T, kBlock>;
  __shared__ __align__(Nf4EncodeTable::kBytes) Nf4EncodeTable encode;
  stage_table(encode.boundary, c_nf4_encode.boundary);
  stage_table(encode.base, c_nf4_encode.base);
  __syncthreads();

  const uint32_t table = ptx::shared_address(&encode);
  const int64_t warp = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t first = warp * Tile::kValues;
  if (first + Tile::kValues <= numel) {
    quantize_warp<T, kBlock, false>(w, numel, first, packed, absmax, table);
  } else if (first < numel) {
    quantize_warp<T, kBlock, true>(w, numel, first, packed, absmax, table);
  }
}

}  // namespace qlora::cuda
