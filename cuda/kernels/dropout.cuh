// Applies a dropout mask in place: x[i] = kept ? x[i] * keep_scale : 0, rounded once.
#pragma once

#include <cstdint>

#include "cpp/format/philox.h"
#include "cuda/tile/element.cuh"

namespace qlora::kernels {

// A thread takes the four elements that one Philox call has the bits of.
template <class T, int kThreads>
__global__ __launch_bounds__(kThreads) void dropout_kernel(T* __restrict__ x, int64_t numel, Dropout dropout) {
  const float keep_scale = static_cast<float>(dropout.keep_scale);
  const int64_t groups = (numel + 3) / 4, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x; group < groups; group += stride) {
    const Philox4 random = philox4x32_10(dropout.seed, static_cast<uint64_t>(group));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t i = group * 4 + j;
      if (i < numel) {
        x[i] = tile::narrow<T>(dropout.keeps(random.lane[j]) ? tile::widen(x[i]) * keep_scale : 0.0f);
      }
    }
  }
}

}  // namespace qlora::kernels
