// dequantize_absmax: decodes 8-bit codes with nested scales to float32 absmax.
#pragma once

#include <cstdint>

#include "cuda/tile/any/block_scale.cuh"

namespace qlora::kernels {

template <int kThreads>
__global__ __launch_bounds__(kThreads) void dequantize_absmax_kernel(const __grid_constant__ tile::ScaleView scales,
                                                                     float* __restrict__ absmax) {
  __shared__ float dynamic8[256];
  tile::fill_dynamic8<kThreads>(dynamic8);
  __syncthreads();
  const float offset = tile::nested_offset(scales);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x; b < scales.blocks; b += stride) {
    absmax[b] = tile::decode_scale(scales, tile::load_scale(scales, b), dynamic8, offset);
  }
}

}  // namespace qlora::kernels
