// encode_nf4 and encode_nf4_stochastic: encode w under given scales to packed codes. A warp's sweeps are laid out as in
// quantize_nf4.cuh. The values that a lane loads lie in one block, and the lane reads that block's scale itself.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cpp/format/stochastic.h"
#include "cuda/kernels/generic/quantize_nf4.cuh"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/mad.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/lane_values.cuh"
#include "cuda/tile/generic/round.cuh"
#include "cuda/tile/generic/stochastic.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::kernels {

inline constexpr int kEncodeSweeps = 4;

// The rounding modes. `inverse` returns the factor that turns a weight into q, and operator() returns the code of q,
// which belongs to element `index` of w. `table` is the shared address of the Table. kOwnScales: the scales were
// computed from w itself, by block_scales.cuh.
template <class Round, bool kOwnScales>
struct NearestCode {
  using Table = typename Round::Table;
  __device__ __forceinline__ void stage(Table* shared) const { round.stage(shared); }

  __device__ __forceinline__ static float inverse(float scale) {
    return kOwnScales ? inverse_absmax(scale) : inverse_scale(scale);
  }
  __device__ __forceinline__ uint32_t operator()(float q, int64_t, uint32_t table) const {
    return Round::code_at(round.place(q, table));
  }

  Round round;
};

template <class Stochastic>
struct StochasticCode {
  using Table = typename Stochastic::Table;
  __device__ __forceinline__ void stage(Table* shared) const { stochastic.stage(shared); }

  __device__ __forceinline__ static float inverse(float scale) { return inverse_scale(scale); }
  __device__ __forceinline__ uint32_t operator()(float q, int64_t index, uint32_t table) const {
    return stochastic(q, rounding_threshold(seed, static_cast<uint64_t>(index)), table);
  }

  Stochastic stochastic;
  uint64_t seed;
};

// Like encode_lane, but the scale need not bound the values. `index` is the index of the lane's first value.
template <class T, class Code>
__device__ __forceinline__ uint32_t encode_lane_under(const tile::LaneValues<T>& values, float scale, int64_t index,
                                                      const Code& code, uint32_t table) {
  const float inverse = Code::inverse(scale);
  uint32_t codes = 0;
#pragma unroll
  for (int nibble = tile::LaneValues<T>::kCount - 1; nibble >= 0; --nibble) {
    const float q = ptx::mul_bits(values.float_bits(nibble ^ 1), inverse);
    codes = ptx::mad<kCodes>(codes, code(q, index + (nibble ^ 1), table));
  }
  return codes;
}

template <class T, class Code, int kThreads>
__global__ __launch_bounds__(kThreads) void encode_nf4_kernel(const T* __restrict__ w, const float* __restrict__ absmax,
                                                              int64_t numel, int block_shift, Code code,
                                                              uint32_t zero_code, uint8_t* __restrict__ packed) {
  constexpr int kPerLane = tile::LaneValues<T>::kCount, kSweep = tile::kWarp * kPerLane;
  __shared__ typename Code::Table shared;
  code.stage(&shared);
  __syncthreads();
  const uint32_t table = ptx::shared_address(&shared);

  const int64_t warp = int64_t{blockIdx.x} * (kThreads / tile::kWarp) + threadIdx.x / tile::kWarp;
  const int64_t first = warp * kEncodeSweeps * kSweep;
  const int64_t begin = first + threadIdx.x % tile::kWarp * kPerLane;
  const bool whole = first + kEncodeSweeps * kSweep <= numel && tile::is_aligned<16>(w) && tile::is_aligned<4>(packed);

  tile::LaneValues<T> values[kEncodeSweeps];
  float scale[kEncodeSweeps];
  tile::unroll<kEncodeSweeps>([&](auto r) {
    const int64_t i = begin + r * kSweep;
    if (whole) {
      values[r].template load<r * tile::kWarp * 16>(w + begin);
    } else {
      values[r].load_tail(w + i, numel - i);
    }
    scale[r] = i < numel ? absmax[i >> block_shift] : 0.0f;
  });
  uint8_t* const out = packed + (begin >> 1);
  tile::unroll<kEncodeSweeps>([&](auto r) {
    constexpr int kOffset = r * kSweep / 2;
    const uint32_t codes = encode_lane_under<T>(values[r], scale[r], begin + r * kSweep, code, table);
    if (!whole) {
      store_codes_tail<kPerLane>(out + kOffset, codes, numel - begin - r * kSweep, zero_code);
    } else if constexpr (kPerLane == 8) {
      ptx::store_stream_u32<kOffset>(out, codes);
    } else {
      ptx::store_stream_u16<kOffset>(out, codes);
    }
  });
}

}  // namespace qlora::kernels
