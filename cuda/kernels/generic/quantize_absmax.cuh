// quantize_absmax: encodes float32 absmax as an offset (the mean), 8-bit codes of absmax - offset, and one float32
// scale per nested block. It takes two launches, because the first code needs the mean of all values. The bits follow
// cpp/format/dynamic8.h exactly.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cpp/format/dynamic8.h"
#include "cuda/tile/generic/code_tables.cuh"
#include "cuda/tile/generic/lane_values.cuh"

namespace qlora::kernels {

// chunk_sums[c] = the sum of chunk c in the format's order. One CTA per chunk, one thread per partial sum.
__global__ __launch_bounds__(kMeanLanes) void absmax_sum_kernel(const float* __restrict__ absmax, int64_t count,
                                                                double* __restrict__ chunk_sums) {
  __shared__ double partial[kMeanLanes];
  const int64_t first = int64_t{blockIdx.x} * kMeanChunk;
  const int64_t last = min(first + kMeanChunk, count);
  double sum = 0.0;
  for (int64_t i = first + threadIdx.x; i < last; i += kMeanLanes) sum += static_cast<double>(absmax[i]);
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kMeanLanes / 2; half; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) chunk_sums[blockIdx.x] = partial[0];
}

// Returns the number of boundaries below q, like dynamic8_encode: a tie goes to the lower entry, NaN to entry 0.
__device__ __forceinline__ int encode_dynamic8(float q, const float (&boundary)[255]) {
  int code = 0;
#pragma unroll
  for (int step = 128; step; step >>= 1) {
    if (q > boundary[code + step - 1]) code += step;
  }
  return code;
}

// One warp per nested block. Every CTA adds up the chunk sums again, in order: fewer than a thousand even for 2^32
// weights.
template <int kThreads>
__global__ __launch_bounds__(kThreads) void quantize_absmax_kernel(
    const float* __restrict__ absmax, int64_t count, int64_t nested_block_size, const double* __restrict__ chunk_sums,
    uint8_t* __restrict__ codes, float* __restrict__ nested_absmax, float* __restrict__ nested_offset) {
  constexpr uint32_t kInfinity = 0x7F800000u, kNaN = 0x7FC00000u;
  __shared__ float boundary[255];
  __shared__ float shared_offset;
  tile::stage_table(boundary, tile::c_dynamic8.boundary);
  if (threadIdx.x == 0) {
    double sum = 0.0;
    for (int64_t c = 0; c < ceil_div(count, kMeanChunk); ++c) sum += chunk_sums[c];
    shared_offset = static_cast<float>(sum / static_cast<double>(count));
    if (blockIdx.x == 0) *nested_offset = shared_offset;
  }
  __syncthreads();
  const float offset = shared_offset;

  const int lane = threadIdx.x % tile::kWarp;
  const int64_t block = int64_t{blockIdx.x} * (kThreads / tile::kWarp) + threadIdx.x / tile::kWarp;
  const int64_t first = block * nested_block_size;
  const int64_t last = min(first + nested_block_size, count);
  if (first >= count) return;

  uint32_t magnitude = 0;
  for (int64_t i = first + lane; i < last; i += tile::kWarp) {
    magnitude = max(magnitude, __float_as_uint(__fsub_rn(absmax[i], offset)) & 0x7FFFFFFFu);
  }
#pragma unroll
  for (int step = tile::kWarp / 2; step; step /= 2) {
    magnitude = max(magnitude, __shfl_xor_sync(0xFFFFFFFFu, magnitude, step));
  }
  const float scale = __uint_as_float(magnitude < kInfinity ? magnitude : kNaN);
  const float inverse = inverse_absmax(scale);
  for (int64_t i = first + lane; i < last; i += tile::kWarp) {
    const float q = __fmul_rn(__fsub_rn(absmax[i], offset), inverse);
    codes[i] = static_cast<uint8_t>(encode_dynamic8(q, boundary));
  }
  if (lane == 0) nested_absmax[block] = scale;
}

}  // namespace qlora::kernels
