// quantize_nf4 for codes that tile::EncodeCells serves, in blocks of 32 weights and more: encodes w as packed codes and
// absmax. The bits follow cpp/format/codes.h exactly. Other codes and block sizes take two launches, block_scales.cuh
// and encode_nf4.cuh.
//
// A warp takes four sweeps of w. A sweep is 16 bytes per lane, consecutive over the 32 lanes, so each load and each
// packed store of a warp covers a contiguous run of whole sectors. A quantization block is one of the following: kGroup
// neighbouring lanes of a sweep, whole sweeps, or several whole warps of a CTA.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/mad.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/code_tables.cuh"
#include "cuda/tile/generic/lane_values.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::kernels {

template <class T, int kBlock>
struct QuantizeTile {
  static constexpr int kPerLane = tile::LaneValues<T>::kCount;
  static constexpr int kSweep = tile::kWarp * kPerLane;  // values
  static constexpr int kSweeps = 4;                      // 16-byte loads a lane has in flight
  static constexpr int kValues = kSweeps * kSweep;       // per warp
  static constexpr int kGroup = kBlock < kSweep ? kBlock / kPerLane : tile::kWarp;
  static constexpr int kBlocksPerSweep = tile::kWarp / kGroup;
  static constexpr int kSweepsPerBlock = kBlock <= kSweep ? 1 : kBlock < kValues ? kBlock / kSweep : kSweeps;
  static constexpr int kSpans = kSweeps / kSweepsPerBlock;  // absmax values a lane sees
  static constexpr int kWarpsPerBlock = kBlock > kValues ? kBlock / kValues : 1;
};

// Returns the lane's codes, packed. Nibble n holds element n ^ 1, because an even element is the high half of its byte.
// `table` is the shared address of the tile::EncodeCells.
template <class T>
__device__ __forceinline__ uint32_t encode_lane(const tile::LaneValues<T>& values, float inverse, uint32_t table) {
  uint32_t codes = 0;
#pragma unroll
  for (int nibble = tile::LaneValues<T>::kCount - 1; nibble >= 0; --nibble) {
    const float q = ptx::mul_bits(values.float_bits(nibble ^ 1), inverse);
    const uint32_t j = ptx::fma_to_bits(q, tile::EncodeCells::kSlope, tile::EncodeCells::kShift);
    const uint32_t cell = ptx::and_or(j, tile::EncodeCells::kOffsetMask, table);
    const float boundary = ptx::load_shared_f32(cell);
    const uint32_t base = ptx::load_shared_u32<tile::EncodeCells::kCells * 4>(cell);
    codes = ptx::mad<kCodes>(codes, base - ptx::greater_mask(q, boundary));
  }
  return codes;
}

// Computes the absmax of each span's block, in every lane of the block. A block with a NaN or an infinity gets NaN.
// `across_warps` is shared memory of one word per warp. Call from all threads of the CTA.
template <class T, int kBlock>
__device__ __forceinline__ void block_absmax(const tile::LaneValues<T> (&values)[QuantizeTile<T, kBlock>::kSweeps],
                                             float (&absmax)[QuantizeTile<T, kBlock>::kSpans], uint32_t* across_warps) {
  using Tile = QuantizeTile<T, kBlock>;
  constexpr uint32_t kInfinity = 0x7F800000u, kNaN = 0x7FC00000u;
#pragma unroll
  for (int s = 0; s < Tile::kSpans; ++s) {
    uint32_t magnitude = 0;
#pragma unroll
    for (int r = 0; r < Tile::kSweepsPerBlock; ++r) {
      magnitude = max(magnitude, values[s * Tile::kSweepsPerBlock + r].max_magnitude());
    }
#pragma unroll
    for (int step = Tile::kGroup / 2; step; step /= 2) {
      magnitude = max(magnitude, __shfl_xor_sync(0xFFFFFFFFu, magnitude, step));
    }
    if constexpr (Tile::kWarpsPerBlock > 1) {
      const int warp = threadIdx.x / tile::kWarp;
      if (threadIdx.x % tile::kWarp == 0) across_warps[warp] = magnitude;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Tile::kWarpsPerBlock; ++i) {
        magnitude = max(magnitude, across_warps[warp / Tile::kWarpsPerBlock * Tile::kWarpsPerBlock + i]);
      }
    }
    absmax[s] = __uint_as_float(magnitude < kInfinity ? magnitude : kNaN);
  }
}

// Stores the first `count` codes of the lane. `count` may also be negative, or more than the lane has. If it is odd,
// the low half of the last byte is the zero code.
template <int kPerLane>
__device__ __forceinline__ void store_codes_tail(uint8_t* out, uint32_t codes, int64_t count, uint32_t zero_code) {
#pragma unroll
  for (int i = 0; i < kPerLane; i += 2) {
    const uint32_t byte = codes >> (i * 4);
    if (i < count) out[i / 2] = static_cast<uint8_t>(i + 1 < count ? byte : (byte & 0xF0u) | zero_code);
  }
}

template <class T, int kBlock, int kThreads>
__global__ __launch_bounds__(kThreads) void quantize_nf4_kernel(const T* __restrict__ w, int64_t numel, int code,
                                                                uint32_t zero_code, uint8_t* __restrict__ packed,
                                                                float* __restrict__ absmax) {
  using Tile = QuantizeTile<T, kBlock>;
  constexpr int kWarps = kThreads / tile::kWarp;
  static_assert(kWarps % Tile::kWarpsPerBlock == 0);
  __shared__ __align__(tile::EncodeCells::kBytes) tile::EncodeCells encode;
  __shared__ uint32_t across_warps[kWarps];
  tile::stage_table(encode.boundary, tile::c_encode.of[code].boundary);
  tile::stage_table(encode.base, tile::c_encode.of[code].base);
  __syncthreads();

  const int lane = threadIdx.x % tile::kWarp;
  const int64_t first = (int64_t{blockIdx.x} * kWarps + threadIdx.x / tile::kWarp) * Tile::kValues;
  const int64_t begin = first + lane * Tile::kPerLane;
  const bool whole = first + Tile::kValues <= numel && tile::is_aligned<16>(w) && tile::is_aligned<4>(packed);

  tile::LaneValues<T> values[Tile::kSweeps];
  tile::unroll<Tile::kSweeps>([&](auto r) {
    if (whole) {
      values[r].template load<r * tile::kWarp * 16>(w + begin);
    } else {
      values[r].load_tail(w + begin + r * Tile::kSweep, numel - begin - r * Tile::kSweep);
    }
  });
  float scale[Tile::kSpans];
  block_absmax<T, kBlock>(values, scale, across_warps);

  const uint32_t table = ptx::shared_address(&encode);
  uint8_t* const out = packed + (begin >> 1);
  tile::unroll<Tile::kSweeps>([&](auto r) {
    constexpr int kOffset = r * Tile::kSweep / 2;
    const float own = scale[r / Tile::kSweepsPerBlock];
    uint32_t codes = encode_lane<T>(values[r], inverse_absmax(own), table);
    codes = own == own ? codes : 0;  // a block with a NaN has code 0 throughout
    if (!whole) {
      store_codes_tail<Tile::kPerLane>(out + kOffset, codes, numel - begin - r * Tile::kSweep, zero_code);
    } else if constexpr (Tile::kPerLane == 8) {
      ptx::store_stream_u32<kOffset>(out, codes);
    } else {
      ptx::store_stream_u16<kOffset>(out, codes);
    }
  });

  // Each lane of a group writes the absmax of a different span, so a single store covers the warp's blocks without
  // gaps.
  const int span = lane % Tile::kGroup;
  const int64_t block = first / kBlock + span * Tile::kBlocksPerSweep + lane / Tile::kGroup;
  float mine = scale[0];
#pragma unroll
  for (int s = 1; s < Tile::kSpans; ++s) mine = span == s ? scale[s] : mine;
  if (span < Tile::kSpans && first % kBlock == 0 && block * kBlock < numel) absmax[block] = mine;
}

}  // namespace qlora::kernels
