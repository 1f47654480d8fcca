// Computes the scale of each quantization block for a code: the block's largest magnitude divided by the code's largest
// value. One warp per block.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/lane_values.cuh"

namespace qlora::kernels {

template <class T, int kThreads>
__global__ __launch_bounds__(kThreads) void block_scales_kernel(const T* __restrict__ w, int64_t numel, int block_size,
                                                                float largest_value, float* __restrict__ scales) {
  constexpr uint32_t kInfinity = 0x7F800000u, kNaN = 0x7FC00000u, kMagnitude = 0x7FFFFFFFu;
  const int lane = threadIdx.x % tile::kWarp;
  const int64_t block = int64_t{blockIdx.x} * (kThreads / tile::kWarp) + threadIdx.x / tile::kWarp;
  const int64_t first = block * block_size, end = min(first + block_size, numel);
  uint32_t magnitude = 0;
  for (int64_t i = first + lane; i < end; i += tile::kWarp)
    magnitude = max(magnitude, __float_as_uint(tile::widen(w[i])) & kMagnitude);
#pragma unroll
  for (int step = tile::kWarp / 2; step; step /= 2)
    magnitude = max(magnitude, __shfl_xor_sync(0xFFFFFFFFu, magnitude, step));
  if (lane == 0 && first < numel)
    scales[block] = scale_of(__uint_as_float(magnitude < kInfinity ? magnitude : kNaN), largest_value);
}

}  // namespace qlora::kernels
