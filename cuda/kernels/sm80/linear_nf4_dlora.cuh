// LoRA's weight gradients, da = gᵀ · mask(x) · keep_scale [r, k] and db = dyᵀ · h [n, r], in one launch. Both are sums
// over the tokens of a wide operand's columns (x or dy) times a low-rank operand's columns (g or h).
//
// A CTA computes 64 columns x 16 kRankTiles ranks over its share of the tokens. Its eight warps take turns at 16
// tokens.
//
// The wide operand is the mma's A, like W in linear_nf4_dx_kernel. A lane loads 8 columns 8g..8g+7 of tokens 4t..4t+3
// (16 bytes each) and pairs tokens with prmt. Four mma divide the columns: mma i has columns 8g + 2i and 8g + 2i + 1 as
// its rows g and g + 8.
//
// The low-rank operand is B. A lane loads ranks 2g and 2g+1 of the same four tokens. Paired, they are column g of two
// mma, one for even and one for odd ranks. So acc[i][2j + o][e] and acc[i][2j + o][2 + e] are columns 8g + 2i and 8g +
// 2i + 1 of rank 16j + 4t + 2e + o.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/linear_nf4_dlora_parts.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/prmt.cuh"

namespace qlora::kernels {

// The loads of both operands are plain: the previous launch may still write them when this kernel starts.

// Loads columns column .. column + 7 of a token as four pairs. Elements past the end and dropped elements are zeros.
template <class T, bool kRagged>
__device__ __forceinline__ uint4 load_wide(const DLoraSide& side, const Dropout& dropout, int64_t m, int64_t tokens,
                                           int64_t column) {
  if (m >= tokens || column >= side.columns) return make_uint4(0, 0, 0, 0);
  const int64_t index = m * side.columns + column;
  const T* from = static_cast<const T*>(side.wide) + index;
  uint4 v;
  if constexpr (kRagged) {
    uint32_t pair[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < side.columns) pair[i / 2] |= uint32_t{from[i].bits} << (16 * (i % 2));
    }
    v = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  } else {
    v = *reinterpret_cast<const uint4*>(from);
  }
  return side.masked ? tile::keep_8(v, tile::keep_mask(dropout, index)) : v;
}

// Loads ranks rank and rank + 1 of a token as a pair (rank is even). Ranks past the end are zeros.
template <class T>
__device__ __forceinline__ uint32_t load_low_rank(const DLoraSide& side, int64_t m, int64_t tokens, int64_t rank,
                                                  int64_t ranks) {
  if (m >= tokens || rank >= ranks) return 0;
  const T* from = static_cast<const T*>(side.low_rank) + m * ranks + rank;
  if (ranks % 2 == 0) return *reinterpret_cast<const uint32_t*>(from);
  return from[0].bits | (rank + 1 < ranks ? uint32_t{from[1].bits} << 16 : 0u);
}

// Sums over tokens [begin, end) for column tile `column_tile` and the ranks of blockIdx.y. This is the work of a whole
// CTA.
template <class T, int kRankTiles, bool kRagged>
__device__ __forceinline__ void linear_nf4_dlora_tile(const DLoraArgs& args, int64_t column_tile, int64_t begin,
                                                      int64_t end) {
  __shared__ DLoraSums sums;
  const DLoraTile tile = make_dlora_tile<16 * kRankTiles>(args, column_tile);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t column = tile.column0 + 8 * g;

  float acc[4][2 * kRankTiles][4] = {};
#pragma unroll 2
  for (int64_t m0 = begin + 16 * warp; m0 < end; m0 += 16 * kDLoraGroups) {
    uint4 wide[4];
    uint32_t low_rank[kRankTiles][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = m0 + 4 * t + i;
      wide[i] = load_wide<T, kRagged>(tile.side, args.dropout, m, args.m, column);
#pragma unroll
      for (int j = 0; j < kRankTiles; ++j)
        low_rank[j][i] = load_low_rank<T>(tile.side, m, args.m, tile.rank0 + 16 * j + 2 * g, args.rank);
    }
    uint32_t b[2 * kRankTiles][2];
#pragma unroll
    for (int j = 0; j < kRankTiles; ++j) {
      b[2 * j][0] = ptx::prmt<0x5410>(low_rank[j][0], low_rank[j][1]);
      b[2 * j][1] = ptx::prmt<0x5410>(low_rank[j][2], low_rank[j][3]);
      b[2 * j + 1][0] = ptx::prmt<0x7632>(low_rank[j][0], low_rank[j][1]);
      b[2 * j + 1][1] = ptx::prmt<0x7632>(low_rank[j][2], low_rank[j][3]);
    }
    const auto add_columns = [&](int i, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
      const uint32_t a0 = ptx::prmt<0x5410>(w0, w1), a1 = ptx::prmt<0x7632>(w0, w1);
      const uint32_t a2 = ptx::prmt<0x5410>(w2, w3), a3 = ptx::prmt<0x7632>(w2, w3);
#pragma unroll
      for (int j = 0; j < 2 * kRankTiles; ++j) ptx::mma_m16n8k16<T>(acc[i][j], a0, a1, a2, a3, b[j][0], b[j][1]);
    };
    add_columns(0, wide[0].x, wide[1].x, wide[2].x, wide[3].x);
    add_columns(1, wide[0].y, wide[1].y, wide[2].y, wide[3].y);
    add_columns(2, wide[0].z, wide[1].z, wide[2].z, wide[3].z);
    add_columns(3, wide[0].w, wide[1].w, wide[2].w, wide[3].w);
  }

#pragma unroll
  for (int j = 0; j < kRankTiles; ++j) {
    __syncthreads();  // the previous ranks' sums have been read
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const int odd = q / 4, e = q % 2, next = q / 2 % 2;
        sums.value[warp][4 * t + 2 * e + odd][8 * g + 2 * i + next] = acc[i][2 * j + odd][2 * next + e];
      }
    }
    __syncthreads();
    finish_dlora<T>(args, tile, sums, j, kRankTiles);
  }
  if (args.splits > 1) add_dlora_splits<T>(args, tile, kRankTiles);
}

// Grid: x = column tile, y = ranks, z = split.
template <class T, int kRankTiles, bool kRagged>
__global__ void __launch_bounds__(kDLoraThreads) linear_nf4_dlora_kernel(const DLoraArgs args) {
  ptx::wait_for_previous_grid();  // dX, for example, behind the launch that computes g
  linear_nf4_dlora_tile<T, kRankTiles, kRagged>(args, blockIdx.x, blockIdx.z * args.tokens_per_split,
                                                min(args.m, (blockIdx.z + 1) * args.tokens_per_split));
}

}  // namespace qlora::kernels
