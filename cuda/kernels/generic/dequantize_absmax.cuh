// dequantize_absmax: decodes 8-bit codes with nested scales to float32 absmax.
#pragma once

#include <cstdint>

#include "cuda/tile/generic/block_scale.cuh"

namespace qlora::kernels {

template <int kThreads>
__global__ __launch_bounds__(kThreads) void dequantize_absmax_kernel(const __grid_constant__ tile::ScaleView scales,
                                                                     float* __restrict__ absmax) {
  __shared__ float scale_values[256];
  tile::fill_scale_values<kThreads>(scales, scale_values);
  __syncthreads();
  const float offset = tile::nested_offset(scales);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x; b < scales.blocks; b += stride) {
    absmax[b] = tile::read_scale(scales, b, scale_values, offset);
  }
}

}  // namespace qlora::kernels
