// The epilogue of a matmul that a library computed: out = round(sum + mask ∘ (left · right) · keep_scale + bias). `sum`
// is the library's result in float32. left · right is LoRA's part: its low-rank product times one of its matrices. out
// is rounded only here.
//
// On tensor cores, tokens are the 16 rows of the mma, columns its 8 columns, and ranks its k. A lane feeds 4
// consecutive ranks as k = 2t, 2t+1, 2t+8, 2t+9, since the order of a sum is free. Two mma divide 16 columns so that a
// lane ends up with four neighbours: with t = lane % 4 and c = 0, 1, column 2t + c of mma e is column 4t + 2e + c of
// the 16.
#pragma once

#include <cstdint>

#include "cpp/format/philox.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/generic/arch_limits.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/lora_step.cuh"

namespace qlora::kernels {

template <class T>
struct LowRankUpdateArgs {
  const float* sum;  // [m, columns]
  const T* left;     // [m, rank]
  const T* right;    // rank r of column c at right[r * rank_stride + c * column_stride]
  int64_t rank_stride, column_stride;
  const T* bias;  // [columns] or null
  T* out;         // [m, columns], rows `out_stride` apart
  int64_t out_stride;
  int64_t m, columns, rank;
  Dropout dropout;       // applies to left · right
  int64_t first_column;  // where `out` begins in the rows, out_stride wide, that number the mask
};

inline constexpr int kUpdateThreads = 256;
// Per SM, and no thread takes more registers than leave room for them. From 10.0 on, these would not suffice.
inline constexpr int kUpdateCtas = tile::kFewRegisters ? 1 : 3;
inline constexpr int kUpdateTokens = 64, kUpdateColumns = 128;  // per CTA: 4 warps of 16 tokens x 2 of 64 columns

// Loads ranks first .. first + 3 of column `column`, two per register. Ranks and columns that do not exist are zeros.
template <class T>
__device__ __forceinline__ uint2 load_right(const LowRankUpdateArgs<T>& p, int64_t first, int64_t column) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    v[i] =
        column < p.columns && first + i < p.rank
            ? __ldg(reinterpret_cast<const uint16_t*>(p.right + (first + i) * p.rank_stride + column * p.column_stride))
            : 0u;
  return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
}

// Finishes four neighbours of out from column `column` of token `token` on. `product` is left · right.
template <class T>
__device__ __forceinline__ void finish_quad(const LowRankUpdateArgs<T>& p, int64_t token, int64_t column,
                                            const float (&product)[4]) {
  if (token >= p.m || column >= p.columns) return;
  const float keep_scale = static_cast<float>(p.dropout.keep_scale);
  const int64_t index = token * p.out_stride + p.first_column + column;
  const uint32_t keep = p.rank > 0 && p.dropout.active() ? tile::keep_mask<4>(p.dropout, index) : 0xFu;
  const float* const sum = p.sum + token * p.columns + column;
  T* const out = p.out + token * p.out_stride + column;
  const int left = static_cast<int>(p.columns - column < 4 ? p.columns - column : 4);
  const bool vector = left == 4 && p.columns % 4 == 0 && (reinterpret_cast<uintptr_t>(out) & 7) == 0;
  float value[4] = {};
  if (vector) {
    const float4 four = *reinterpret_cast<const float4*>(sum);
    value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) value[i] = sum[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (keep >> i & 1) value[i] = p.dropout.active() ? fmaf(product[i], keep_scale, value[i]) : value[i] + product[i];
    if (p.bias != nullptr && i < left) value[i] += tile::widen(p.bias[column + i]);
  }
  if constexpr (sizeof(T) == 2) {
    if (vector) {
      ptx::store_v2(out, make_uint2(ptx::pack2<T>(value[0], value[1]), ptx::pack2<T>(value[2], value[3])));
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < left) out[i] = tile::narrow<T>(value[i]);
}

// For bfloat16 and float16. Grid: x over column tiles, y strides over token tiles.
template <class T>
__global__ void __launch_bounds__(kUpdateThreads, kUpdateCtas)
    low_rank_update_kernel(const __grid_constant__ LowRankUpdateArgs<T> p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t column0 = int64_t{blockIdx.x} * kUpdateColumns + warp % 2 * 64;
  for (int64_t tile = blockIdx.y; tile * kUpdateTokens < p.m; tile += gridDim.y) {
    const int64_t token = tile * kUpdateTokens + warp / 2 * 16 + g;
    float acc[4][2][4] = {};  // [16 columns][mma e][tokens g and g + 8, c = 0 and 1]
    for (int first = 4 * t; first - 4 * t < p.rank; first += 16) {
      const uint2 low = tile::load_4_ranks<T, false>(p.left + token * p.rank, first, p.rank, token < p.m);
      const uint2 high = tile::load_4_ranks<T, false>(p.left + (token + 8) * p.rank, first, p.rank, token + 8 < p.m);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint2 right = load_right(p, first, column0 + 16 * i + g / 2 * 4 + 2 * e + g % 2);
          ptx::mma_m16n8k16<T>(acc[i][e], low.x, high.x, low.y, high.y, right.x, right.y);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const float product[4] = {acc[i][0][2 * upper], acc[i][0][2 * upper + 1], acc[i][1][2 * upper],
                                  acc[i][1][2 * upper + 1]};
        finish_quad(p, token + 8 * upper, column0 + 16 * i + 4 * t, product);
      }
    }
  }
}

// For float32, by float32 FMA: a thread computes four neighbours at a time. The grid is as above.
__global__ void __launch_bounds__(kUpdateThreads)
    low_rank_update_exact_kernel(const __grid_constant__ LowRankUpdateArgs<float> p) {
  const int64_t column = int64_t{blockIdx.x} * kUpdateColumns + threadIdx.x % 32 * 4;
  for (int64_t token = int64_t{blockIdx.y} * 8 + threadIdx.x / 32; token < p.m; token += int64_t{gridDim.y} * 8) {
    float product[4] = {};
#pragma unroll 1
    for (int64_t r = 0; r < p.rank; ++r) {
      const float left = p.left[token * p.rank + r];
      const float* const right = p.right + r * p.rank_stride + column * p.column_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + i < p.columns) product[i] = fmaf(left, right[i * p.column_stride], product[i]);
    }
    finish_quad(p, token, column, product);
  }
}

}  // namespace qlora::kernels
