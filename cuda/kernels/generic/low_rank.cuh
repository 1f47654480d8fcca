// LoRA's low-rank products, h in the forward and g in the backward: out [m, rank] = round(factor · mask(x) · aᵀ). a is
// [rank, k] (h = scaling · dropout(x) · lora_aᵀ) or, transposed, [k, rank] (g = scaling · dy · lora_b).
//
// On tensor cores, the ranks are the 16 rows of the mma and the tokens its 8 columns. The order of k in a sum is free,
// so a lane takes 8 consecutive k of its row with one 16-byte load and feeds them as the k of two mma. No operand
// passes through shared memory. The warps of a CTA divide k, and so do the CTAs of a cluster. Their sums are added in a
// fixed order.
#pragma once

#include <cstdint>

#include "cpp/format/philox.h"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/tile/generic/cluster_sum.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"

namespace qlora::kernels {

inline constexpr int kLowRankWarps = 16;
inline constexpr int kLowRankThreads = 32 * kLowRankWarps;
inline constexpr int kLowRankScalarRanks = 4;  // per warp
inline constexpr int kLowRankScalarThreads = 128;

template <class T>
struct LowRankArgs {
  const T* x;
  const T* a;
  T* out;  // [m, rank]; may be null if there is `extended`
  int64_t m, k, rank;
  float factor;  // scaling times dropout's keep_scale
  Dropout dropout;
  uint32_t* clear;  // words that this launch also sets to zero, for the next kernel
  int64_t clear_count;
  T* extended = nullptr;  // also written: [x | out | 1 if has_one | zeros], k + terms per row
  int64_t terms = 0;
  bool has_one = false;
};

// Zeroes the dropped halves of `pair`, which holds two neighbouring elements. bits0 and bits1 are their random bits.
__device__ __forceinline__ uint32_t drop_pair(const Dropout& dropout, uint32_t pair, uint32_t bits0, uint32_t bits1) {
  return pair & ((dropout.keeps(bits0) ? 0x0000FFFFu : 0u) | (dropout.keeps(bits1) ? 0xFFFF0000u : 0u));
}

// Applies dropout to the 8 elements from row-major index `index`, a multiple of 4.
__device__ __forceinline__ void drop8(const Dropout& dropout, int64_t index, uint4& x) {
  const Philox4 low = philox4x32_10(dropout.key(), static_cast<uint64_t>(index) / 4);
  const Philox4 high = philox4x32_10(dropout.key(), static_cast<uint64_t>(index) / 4 + 1);
  x.x = drop_pair(dropout, x.x, low.lane[0], low.lane[1]);
  x.y = drop_pair(dropout, x.y, low.lane[2], low.lane[3]);
  x.z = drop_pair(dropout, x.z, high.lane[0], high.lane[1]);
  x.w = drop_pair(dropout, x.w, high.lane[2], high.lane[3]);
}

// Loads the A operand of both mma that take this lane's 8 k from `k0` on, for the 16 ranks from `rank0` on (zeros
// unless `valid`). From [rank, k]: row i of the mma is rank rank0 + i.
template <class T>
__device__ __forceinline__ void load_ranks(const LowRankArgs<T>& p, int64_t rank0, int64_t k0, bool valid, int g,
                                           uint32_t (&f)[8]) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const T* row = p.a + (rank0 + g) * p.k + k0;
  const uint4 low = valid && rank0 + g < p.rank ? __ldg(reinterpret_cast<const uint4*>(row)) : zero;
  const uint4 high = valid && rank0 + g + 8 < p.rank ? __ldg(reinterpret_cast<const uint4*>(row + 8 * p.k)) : zero;
  f[0] = low.x, f[1] = high.x, f[2] = low.y, f[3] = high.y;
  f[4] = low.z, f[5] = high.z, f[6] = low.w, f[7] = high.w;
}

// The same from [k, rank]. A lane loads ranks 2g and 2g+1 of its 8 rows k and pairs rows, so row g of the mma is rank
// rank0 + 2g, and row g + 8 is rank rank0 + 2g + 1.
template <class T>
__device__ __forceinline__ void load_ranks_transposed(const LowRankArgs<T>& p, int64_t rank0, int64_t k0, bool valid,
                                                      int g, uint32_t (&f)[8]) {
  const int64_t rank = rank0 + 2 * g;
  uint32_t row[8] = {};
  if (valid && rank < p.rank) {
    const T* from = p.a + k0 * p.rank + rank;
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i] = __ldg(reinterpret_cast<const uint32_t*>(from + i * p.rank));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = ptx::prmt<0x5410>(row[2 * i], row[2 * i + 1]);
    f[2 * i + 1] = ptx::prmt<0x7632>(row[2 * i], row[2 * i + 1]);
  }
}

__device__ __forceinline__ void clear_words(uint32_t* words, int64_t count) {
  const int64_t row = int64_t{blockIdx.z} * gridDim.y + blockIdx.y, rows = int64_t{gridDim.z} * gridDim.y;
  const int64_t cta = row * gridDim.x + blockIdx.x, ctas = rows * gridDim.x;
  for (int64_t i = cta * blockDim.x + threadIdx.x; i < count; i += ctas * blockDim.x) words[i] = 0;
}

// Stores four of the sums for the 16 ranks from rank0 on. `quad` is 32 times the token tile, plus the lane (g, t) that
// holds them as its accumulators: rows g and g + 8 of the mma, columns 2t and 2t + 1.
template <bool kTransposed, bool kExtends, class T>
__device__ __forceinline__ void store_low_rank(const LowRankArgs<T>& p, int64_t token0, int64_t rank0, int quad,
                                               float4 sum) {
  const int g = quad / 4 % 8;
  const int64_t token = token0 + quad / 32 * 8 + quad % 4 * 2;
  const int64_t low = rank0 + (kTransposed ? 2 * g : g), high = rank0 + (kTransposed ? 2 * g + 1 : g + 8);
  const auto store = [&](int64_t at_token, int64_t rank, float v) {
    if (at_token >= p.m) return;
    const T rounded = tile::narrow<T>(v * p.factor);
    if (rank < p.rank && (!kExtends || p.out != nullptr)) p.out[at_token * p.rank + rank] = rounded;
    if (!kExtends || rank >= p.terms) return;
    const float after = rank == p.rank && p.has_one ? 1.0f : 0.0f;
    p.extended[at_token * (p.k + p.terms) + p.k + rank] = rank < p.rank ? rounded : tile::narrow<T>(after);
  };
  store(token, low, sum.x), store(token + 1, low, sum.y);
  store(token, high, sum.z), store(token + 1, high, sum.w);
}

// Adds one warp's part to acc. The warps take turns at 32 k: this warp begins at k = `first` and advances by `step`. It
// loads kTurns of these pieces before it multiplies the first, as many as the registers hold. If kExtends, the CTAs of
// the first ranks copy x.
template <bool kDropout, bool kTransposed, int kTurns, bool kExtends, class T, int kRankTiles, int kTokenTiles>
__device__ __forceinline__ void add_low_rank(const LowRankArgs<T>& p, int64_t token0, int64_t rank0, int64_t first,
                                             int64_t step, float (&acc)[kRankTiles][kTokenTiles][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int64_t k = first; k < p.k; k += kTurns * step) {
    uint4 x[kTurns][kTokenTiles];
    uint32_t a[kTurns][kRankTiles][8];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (k + turn * step >= p.k) break;
      const int64_t k0 = k + turn * step + 8 * t;
      const bool valid = k0 < p.k;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int64_t token = token0 + 8 * j + g;
        x[turn][j] = make_uint4(0, 0, 0, 0);
        if (!valid || token >= p.m) continue;
        x[turn][j] = __ldg(reinterpret_cast<const uint4*>(p.x + token * p.k + k0));
        if (kExtends && blockIdx.y == 0)
          *reinterpret_cast<uint4*>(p.extended + token * (p.k + p.terms) + k0) = x[turn][j];
      }
#pragma unroll
      for (int i = 0; i < kRankTiles; ++i) {
        if constexpr (kTransposed)
          load_ranks_transposed(p, rank0 + 16 * i, k0, valid, g, a[turn][i]);
        else
          load_ranks(p, rank0 + 16 * i, k0, valid, g, a[turn][i]);
      }
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (k + turn * step >= p.k) break;
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        uint4& v = x[turn][j];
        if constexpr (kDropout) drop8(p.dropout, (token0 + 8 * j + g) * p.k + k + turn * step + 8 * t, v);
#pragma unroll
        for (int i = 0; i < kRankTiles; ++i) {
          const uint32_t (&f)[8] = a[turn][i];
          ptx::mma_m16n8k16<T>(acc[i][j], f[0], f[1], f[2], f[3], v.x, v.y);
          ptx::mma_m16n8k16<T>(acc[i][j], f[4], f[5], f[6], f[7], v.z, v.w);
        }
      }
    }
  }
}

// Computes 8·kTokenTiles tokens from token0 on and 16·kRankTiles ranks from rank0 on. This is the work of a whole CTA,
// or of a cluster along gridDim.z. Requires k % 8 == 0, and x and a aligned to 16 bytes; if transposed, also an even
// rank.
template <class T, bool kTransposed, int kRankTiles, int kTokenTiles, int kTurns, bool kExtends = false>
__device__ __forceinline__ void low_rank_tile(const LowRankArgs<T>& p, int64_t token0, int64_t rank0) {
  constexpr int kQuads = 32 * kTokenTiles;  // quadruples of sums for 16 ranks
  __shared__ float4 partial[kLowRankWarps][kQuads];
  __shared__ float4 sums[kRankTiles][kQuads];  // of the CTA
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  float acc[kRankTiles][kTokenTiles][4] = {};
  const int64_t first = 32 * (int64_t{blockIdx.z} * kLowRankWarps + warp), step = 32 * kLowRankWarps * gridDim.z;
  if (p.dropout.active())
    add_low_rank<true, kTransposed, kTurns, kExtends>(p, token0, rank0, first, step, acc);
  else
    add_low_rank<false, kTransposed, kTurns, kExtends>(p, token0, rank0, first, step, acc);

#pragma unroll
  for (int i = 0; i < kRankTiles; ++i) {
    if (i > 0) __syncthreads();
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
      partial[warp][32 * j + lane] = make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
    __syncthreads();
    for (int e = threadIdx.x; e < 4 * kQuads; e += kLowRankThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kLowRankWarps; ++w) sum += reinterpret_cast<const float*>(partial[w])[e];
      reinterpret_cast<float*>(sums[i])[e] = sum;
    }
  }
  ptx::cluster_sync();
  for (int i = blockIdx.z * kLowRankThreads + threadIdx.x; i < kRankTiles * kQuads; i += gridDim.z * kLowRankThreads) {
    const int tile = i / kQuads, quad = i % kQuads;
    store_low_rank<kTransposed, kExtends>(p, token0, rank0 + 16 * tile, quad,
                                          tile::cluster_sum(&sums[tile][quad], gridDim.z));
  }
  ptx::cluster_sync();  // no CTA ends while another reads its sums
}

// Grid: x over 8·kTokenTiles tokens, y over 16·kRankTiles ranks, z over k. If z is more than one, it is a cluster.
template <class T, bool kTransposed, int kRankTiles, int kTokenTiles, bool kExtends>
__global__ void __launch_bounds__(kLowRankThreads) low_rank_kernel(const __grid_constant__ LowRankArgs<T> p) {
  ptx::start_next_grid();
  clear_words(p.clear, p.clear_count);
  constexpr int kTurns = kRankTiles * kTokenTiles > 1 ? 1 : 4;
  low_rank_tile<T, kTransposed, kRankTiles, kTokenTiles, kTurns, kExtends>(p, int64_t{blockIdx.x} * (8 * kTokenTiles),
                                                                           int64_t{blockIdx.y} * (16 * kRankTiles));
}

// For any type, shape and alignment. A warp computes kLowRankScalarRanks ranks of one token in float32, and its lanes
// stride over k. A CTA takes the ranks of blockIdx.y.
template <class T, bool kTransposed>
__device__ __forceinline__ void low_rank_token(const LowRankArgs<T>& p, int64_t token) {
  const int lane = threadIdx.x % 32;
  const int64_t rank0 = (int64_t{blockIdx.y} * (kLowRankScalarThreads / 32) + threadIdx.x / 32) * kLowRankScalarRanks;
  float acc[kLowRankScalarRanks] = {};
  for (int64_t k = lane; k < p.k; k += 32) {
    const int64_t index = token * p.k + k;
    float x = tile::widen(p.x[index]);
    if (p.dropout.active() && !(tile::keep_mask<4>(p.dropout, index / 4 * 4) >> (index % 4) & 1)) x = 0.0f;
#pragma unroll
    for (int i = 0; i < kLowRankScalarRanks; ++i)
      if (rank0 + i < p.rank)
        acc[i] = fmaf(x, tile::widen(p.a[kTransposed ? k * p.rank + rank0 + i : (rank0 + i) * p.k + k]), acc[i]);
  }
#pragma unroll
  for (int i = 0; i < kLowRankScalarRanks; ++i) {
    for (int offset = 16; offset > 0; offset /= 2) acc[i] += __shfl_xor_sync(0xFFFFFFFFu, acc[i], offset);
    if (lane == 0 && rank0 + i < p.rank) p.out[token * p.rank + rank0 + i] = tile::narrow<T>(acc[i] * p.factor);
  }
}

// Grid: x over tokens, y over 4·kLowRankScalarRanks ranks.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kLowRankScalarThreads)
    low_rank_scalar_kernel(const __grid_constant__ LowRankArgs<T> p) {
  ptx::start_next_grid();
  clear_words(p.clear, p.clear_count);
  for (int64_t token = blockIdx.x; token < p.m; token += gridDim.x) low_rank_token<T, kTransposed>(p, token);
}

}  // namespace qlora::kernels
