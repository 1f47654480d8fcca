// search_absmax_nf4: finds for each block the scale with the least weighted error. The bits equal those of the CPU
// kernel; cpp/cpu/codec/search_absmax-inl.h defines the objective and the order of its sums.
//
// 16 lanes take a block, and each computes one of the 16 partial sums that the format's order has. One pass over the
// block sums the errors of all candidate scales, so blocks of any size need no buffer. The later passes find the block
// in L1.
#pragma once

#include <cstdint>

#include "cpp/format/codes.h"
#include "cpp/format/search_absmax.h"
#include "cuda/ptx/address.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/lane_values.cuh"
#include "cuda/tile/generic/round.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::kernels {

inline constexpr int kSearchLanes = 16;

// A lane's part of a block: elements that lie kSearchLanes apart, and the importance of their columns.
template <class T>
struct BlockLane {
  const T* w;  // the block's first weight
  const float* importance;
  int64_t k, column;  // the row length, and the column of the lane's first element
  int first, count;   // in the block: the lane's first element, and the number of elements

  template <class Body>
  __device__ __forceinline__ void for_each(Body&& body) const {
    int64_t at = column;
    for (int i = first; i < count; i += kSearchLanes) {
      body(tile::widen(w[i]), importance[at]);
      at += kSearchLanes;
      while (at >= k) at -= k;
    }
  }
};

// Returns the sum over a block's 16 lanes to all of them, with halves added to halves. Call from all lanes of the warp.
__device__ __forceinline__ float sum_of_lanes(float sum) {
#pragma unroll
  for (int half = kSearchLanes / 2; half; half /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, half));
  }
  return sum;
}

// Adds the weighted error of one weight to `sum`, in units of the scale's square.
template <class Round>
__device__ __forceinline__ float add_error(const Round& round, float sum, float w, float importance, float inverse,
                                           uint32_t table) {
  const float q = __fmul_rn(w, inverse);
  const float error = __fsub_rn(q, Round::value_at(round.place(q, table)));
  return __fadd_rn(sum, __fmul_rn(__fmul_rn(error, error), importance));
}

__device__ __forceinline__ float block_error(float sum, float scale) {
  return __fmul_rn(__fmul_rn(sum_of_lanes(sum), scale), scale);
}

// Returns the best scale for the codes that `scale` gives, or 0 if all codes with nonzero importance have the value
// zero.
template <class Round, class T>
__device__ __forceinline__ float fitted_scale(const Round& round, const BlockLane<T>& block, float scale,
                                              uint32_t table) {
  const float inverse = inverse_scale(scale);
  float products = 0.0f, squares = 0.0f;
  block.for_each([&](float w, float importance) {
    const float value = Round::value_at(round.place(__fmul_rn(w, inverse), table));
    const float weighted = __fmul_rn(value, importance);
    products = __fadd_rn(products, __fmul_rn(weighted, w));
    squares = __fadd_rn(squares, __fmul_rn(weighted, value));
  });
  const float square = sum_of_lanes(squares), product = sum_of_lanes(products);
  return square > 0.0f ? __fdiv_rn(product, square) : 0.0f;
}

template <class Round, class T>
__device__ __forceinline__ float best_scale(const Round& round, const BlockLane<T>& block, float absmax,
                                            uint32_t table) {
  constexpr int kCandidates = 1 + kSearchSteps;
  const auto candidate = [&](auto c) {
    if constexpr (c == 0) {
      return absmax;
    } else {
      constexpr float kFactor = search_factor(c - 1);
      return __fmul_rn(absmax, kFactor);
    }
  };
  float inverse[kCandidates], sum[kCandidates];
  tile::unroll<kCandidates>([&](auto c) { inverse[c] = inverse_scale(candidate(c)), sum[c] = 0.0f; });
  block.for_each([&](float w, float importance) {
    tile::unroll<kCandidates>([&](auto c) { sum[c] = add_error(round, sum[c], w, importance, inverse[c], table); });
  });
  float best = absmax, least = block_error(sum[0], absmax);
  const auto consider = [&](float scale, float error) {
    const bool better = error < least;
    best = better ? scale : best;
    least = better ? error : least;
  };
  tile::unroll<kSearchSteps>([&](auto step) {
    constexpr tile::Index<step + 1> kCandidate;
    consider(candidate(kCandidate), block_error(sum[kCandidate], candidate(kCandidate)));
  });
#pragma unroll 1
  for (int fit = 0; fit < kSearchFits; ++fit) {
    const float scale = fitted_scale(round, block, best, table);
    const float scale_inverse = inverse_scale(scale);
    float fitted = 0.0f;
    block.for_each(
        [&](float w, float importance) { fitted = add_error(round, fitted, w, importance, scale_inverse, table); });
    const float error = block_error(fitted, scale);
    if (scale > 0.0f) consider(scale, error);
  }
  return best;
}

template <class Round, class T, int kThreads>
__global__ __launch_bounds__(kThreads) void search_absmax_kernel(const Round round, float largest_value,
                                                                 const T* __restrict__ w,
                                                                 const float* __restrict__ importance, int64_t numel,
                                                                 int64_t k, int block_size,
                                                                 float* __restrict__ absmax) {
  constexpr uint32_t kInfinity = 0x7F800000u, kNaN = 0x7FC00000u, kMagnitude = 0x7FFFFFFFu;
  __shared__ typename Round::Table table;
  round.stage(&table);
  __syncthreads();

  const int lane = threadIdx.x % kSearchLanes;
  const int64_t b = int64_t{blockIdx.x} * (kThreads / kSearchLanes) + threadIdx.x / kSearchLanes;
  const int64_t first = b * block_size;
  // Lanes past the last block run along with the others, but have no elements.
  const int count = static_cast<int>(max(int64_t{0}, min(int64_t{block_size}, numel - first)));
  const BlockLane<T> block = {w + first, importance, k, (first + lane) % k, lane, count};

  uint32_t magnitude = 0;
  block.for_each([&](float value, float) { magnitude = max(magnitude, __float_as_uint(value) & kMagnitude); });
#pragma unroll
  for (int step = kSearchLanes / 2; step; step /= 2) {
    magnitude = max(magnitude, __shfl_xor_sync(0xFFFFFFFFu, magnitude, step));
  }
  const float largest = __uint_as_float(magnitude < kInfinity ? magnitude : kNaN);
  const float best = best_scale(round, block, scale_of(largest, largest_value), ptx::shared_address(&table));
  if (lane == 0 && count > 0) absmax[b] = largest > 0.0f ? best : largest;
}

}  // namespace qlora::kernels
