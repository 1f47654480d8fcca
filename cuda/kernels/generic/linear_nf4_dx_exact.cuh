// dx = dy · w + mask ∘ (g · a) · keep_scale for float32, for float16 on devices without the tensor cores' kernels, and
// for wide codes. Every operand is widened or decoded to float32, and every product is a float32 FMA.
//
// A CTA computes dx[kDxExactTokens tokens][128 columns] over its share of the rows n. A thread has one column and every
// second row. Any n, k and alignment work. LoRA's part, a sum over the rank, is added when the outputs are stored.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/linear_nf4_dx_args.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/split.cuh"

namespace qlora::kernels {

inline constexpr int kDxExactTokens = 16;    // per CTA
inline constexpr int kDxExactColumns = 128;  // of w, per CTA
inline constexpr int kDxExactThreads = 2 * kDxExactColumns;
inline constexpr int kDxExactStageRows = 32;  // of w, per stage

template <class T>
__device__ __forceinline__ float dx_lora_exact(const DxArgs& args, int64_t m, int64_t column) {
  const T* g = static_cast<const T*>(args.g) + m * args.rank;
  const T* a = static_cast<const T*>(args.lora_a) + column;
  float sum = 0.0f;
  for (int64_t r = 0; r < args.rank; ++r) sum = fmaf(tile::widen(g[r]), tile::widen(a[r * args.k]), sum);
  if (!args.dropout.active()) return sum;
  const bool keep = tile::keep_mask(args.dropout, m * args.k + column) & 1;
  return keep ? sum * static_cast<float>(args.dropout.keep_scale) : 0.0f;
}

// Computes the tile of tokens token0.. and columns column0.. over split blockIdx.y of the rows. This is the work of a
// whole CTA.
template <class T, bool kWide>
__device__ __forceinline__ void linear_nf4_dx_exact_tile(const DxArgs& args, int64_t token0, int64_t column0) {
  __shared__ float values[tile::kStagedValues<kWide>], scale_values[256];
  __shared__ float dy[kDxExactStageRows][kDxExactTokens];
  __shared__ float sums[kDxExactTokens][kDxExactColumns];
  tile::stage_values(values, args.code);
  tile::fill_scale_values<kDxExactThreads>(args.scales, scale_values);
  const float offset = tile::nested_offset(args.scales);
  ptx::wait_for_previous_grid();  // which computes g, and clears the tickets

  const int64_t row0 = blockIdx.y * args.rows_per_split, row_end = min(args.n, row0 + args.rows_per_split);
  const int column_in_tile = threadIdx.x % kDxExactColumns, half = threadIdx.x / kDxExactColumns;
  const int64_t column = column0 + column_in_tile;

  float acc[kDxExactTokens] = {};
  for (int64_t stage = row0; stage < row_end; stage += kDxExactStageRows) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDxExactStageRows * kDxExactTokens; i += kDxExactThreads) {
      const int row = i % kDxExactStageRows, token = i / kDxExactStageRows;
      const int64_t m = token0 + token, n = stage + row;
      const bool valid = m < args.m && n < row_end;
      dy[row][token] = valid ? tile::widen(static_cast<const T*>(args.dy)[m * args.n + n]) : 0.0f;
    }
    __syncthreads();
    if (column >= args.k) continue;
    const int rows = static_cast<int>(min(row_end - stage, int64_t{kDxExactStageRows}));
    float part[kDxExactTokens] = {};  // summed per stage, because rounding errors grow with the length of a sum
    tile::with_offsets(args.scales, [&](auto has_offsets) {
#pragma unroll 4
      for (int row = half; row < rows; row += 2) {
        const int64_t element = (stage + row) * args.k + column, block = element >> args.scales.block_shift;
        const float scale = tile::read_scale(args.scales, block, scale_values, offset);
        const int code = kWide ? code_at(args.packed, element, args.code.wide.bits) : code_at(args.packed, element);
        float w = values[code];
        if constexpr (has_offsets)
          w = tile::BlockDecoder(args.scales, block, scale)(w);
        else
          w = __fmul_rn(w, scale);
#pragma unroll
        for (int i = 0; i < kDxExactTokens; ++i) part[i] = fmaf(dy[row][i], w, part[i]);
      }
    });
#pragma unroll
    for (int i = 0; i < kDxExactTokens; ++i) acc[i] += part[i];
  }

  // Adds the two halves of the rows, then the splits, always in the same order.
  if (half == 1) {
#pragma unroll
    for (int i = 0; i < kDxExactTokens; ++i) sums[i][column_in_tile] = acc[i];
  }
  __syncthreads();
  float* partials = args.partials + (int64_t{blockIdx.x} * args.splits * kDxExactTokens) * kDxExactColumns;
  if (half == 0) {
#pragma unroll
    for (int i = 0; i < kDxExactTokens; ++i) {
      acc[i] += sums[i][column_in_tile];
      if (args.splits > 1) {
        partials[(int64_t{blockIdx.y} * kDxExactTokens + i) * kDxExactColumns + column_in_tile] = acc[i];
      } else {
        sums[i][column_in_tile] = acc[i];
      }
    }
  }
  if (args.splits > 1 && !tile::arrives_last(args.tickets + blockIdx.x, args.splits)) return;
  __syncthreads();
  if (column >= args.k) return;
  for (int i = half; i < kDxExactTokens && token0 + i < args.m; i += 2) {
    float sum = 0.0f;
    if (args.splits > 1) {
      for (int split = 0; split < args.splits; ++split) {
        sum += __ldcg(partials + (int64_t{split} * kDxExactTokens + i) * kDxExactColumns + column_in_tile);
      }
    } else {
      sum = sums[i][column_in_tile];
    }
    sum += dx_lora_exact<T>(args, token0 + i, column);
    static_cast<T*>(args.dx)[(token0 + i) * args.k + column] = tile::narrow<T>(sum);
  }
}

// The grid is that of linear_nf4_dx_kernel, with the tile above. To fit more than 3 CTAs, ptxas would spill registers.
template <class T, bool kWide>
__global__ void __launch_bounds__(kDxExactThreads, 3) linear_nf4_dx_exact_kernel(const DxArgs args) {
  ptx::start_next_grid();
  linear_nf4_dx_exact_tile<T, kWide>(args, int64_t{blockIdx.x % args.token_tiles} * kDxExactTokens,
                                     int64_t{blockIdx.x / args.token_tiles} * kDxExactColumns);
}

}  // namespace qlora::kernels
