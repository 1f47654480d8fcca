// h and g of tokens that use different adapters: each token's product with its own adapter's matrix, with the bits that
// low_rank.cuh gives that adapter alone. So sums over k are split and added as there, which depends on the adapter's
// rank. A CTA computes 16 ranks of 8 tokens, once for each adapter that these tokens use. Over experts, those of
// grouped_low_rank.cuh, and each expert has its own matrices.
//
// The products go to `stack` [m, count · padded_rank], in which each adapter has padded_rank columns. A token's columns
// of other adapters are zeros.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/low_rank.cuh"
#include "cuda/tile/generic/adapters.cuh"
#include "cuda/tile/generic/arch_limits.cuh"

namespace qlora::kernels {

inline constexpr int kMostRankTiles = 64;  // of 64 ranks
inline constexpr int kAdapterTokens = 8, kAdapterRanks = 16;

template <class T>
struct AdapterLowRankArgs {
  tile::AdapterStacks stacks;
  const T* x;
  const T* a;  // [stack_rank, k], or [k, stack_rank] if transposed, of each expert
  T* stack;    // or null
  T* out;      // [m, max_rank], or null
  int64_t m, k, padded_rank;
  Dropout dropout;                         // of x
  uint8_t splits_of_16;                    // the CTAs that divide k for up to 16 ranks,
  uint8_t splits_of_more[kMostRankTiles];  // and for more: up to 64, up to 128, ...
};

template <class T>
__device__ __forceinline__ int splits_of(const AdapterLowRankArgs<T>& p, int64_t rank) {
  if (rank <= 16) return p.splits_of_16;
  return p.splits_of_more[min((rank - 1) / 64, int64_t{kMostRankTiles - 1})];
}

// An expert's part of `a`.
template <class T>
__device__ __forceinline__ const T* own_matrix(const AdapterLowRankArgs<T>& p, int64_t expert) {
  return p.a + expert * p.stacks.adapters.stack_rank * p.k;
}

// The A operand of both mma, as load_ranks and load_ranks_transposed have it. Ranks of a stack may begin at any
// element.
template <class T, bool kTransposed>
__device__ __forceinline__ void load_adapter_ranks(const AdapterLowRankArgs<T>& p, const T* a,
                                                   const tile::AdapterRanks& ranks, int64_t rank0, int64_t k0,
                                                   bool valid, int g, uint32_t (&f)[8]) {
  if constexpr (!kTransposed) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const T* row = a + (ranks.first + rank0 + g) * p.k + k0;
    const uint4 low = valid && rank0 + g < ranks.count ? __ldg(reinterpret_cast<const uint4*>(row)) : zero;
    const uint4 high =
        valid && rank0 + g + 8 < ranks.count ? __ldg(reinterpret_cast<const uint4*>(row + 8 * p.k)) : zero;
    f[0] = low.x, f[1] = high.x, f[2] = low.y, f[3] = high.y;
    f[4] = low.z, f[5] = high.z, f[6] = low.w, f[7] = high.w;
  } else {
    const int64_t rank = rank0 + 2 * g, stride = p.stacks.adapters.stack_rank;
    const T* from = a + k0 * stride + ranks.first + rank;
    uint32_t row[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (valid && rank < ranks.count) row[i] = from[i * stride].bits;
      if (valid && rank + 1 < ranks.count) row[i] |= uint32_t{from[i * stride + 1].bits} << 16;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = ptx::prmt<0x5410>(row[2 * i], row[2 * i + 1]);
      f[2 * i + 1] = ptx::prmt<0x7632>(row[2 * i], row[2 * i + 1]);
    }
  }
}

// One warp's part of a split, as add_low_rank adds it.
template <class T, bool kTransposed>
__device__ __forceinline__ void add_adapter(const AdapterLowRankArgs<T>& p, const T* a, const tile::AdapterRanks& ranks,
                                            const Dropout& dropout, int64_t token0, int64_t rank0, int64_t first,
                                            int64_t step, float (&acc)[4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t token = token0 + g;
#pragma unroll 1
  for (int64_t k = first; k < p.k; k += step) {
    const int64_t k0 = k + 8 * t;
    const bool valid = k0 < p.k;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (valid && token < p.m) x = __ldg(reinterpret_cast<const uint4*>(p.x + token * p.k + k0));
    uint32_t f[8];
    load_adapter_ranks<T, kTransposed>(p, a, ranks, rank0, k0, valid, g, f);
    if (dropout.active()) drop8(dropout, token * p.k + k0, x);
    ptx::mma_m16n8k16<T>(acc, f[0], f[1], f[2], f[3], x.x, x.y);
    ptx::mma_m16n8k16<T>(acc, f[4], f[5], f[6], f[7], x.z, x.w);
  }
}

// Returns one rank's sum over k, as low_rank_token adds it. Call from a whole warp.
template <class T, bool kTransposed>
__device__ __forceinline__ float adapter_sum(const AdapterLowRankArgs<T>& p, const T* a,
                                             const tile::AdapterRanks& ranks, const Dropout& dropout, int64_t token,
                                             int64_t rank) {
  const int64_t stride = p.stacks.adapters.stack_rank;
  float acc = 0.0f;
  for (int64_t k = threadIdx.x % 32; k < p.k; k += 32) {
    const int64_t index = token * p.k + k;
    float x = tile::widen(p.x[index]);
    if (dropout.active() && !(tile::keep_mask<4>(dropout, index / 4 * 4) >> (index % 4) & 1)) x = 0.0f;
    const T& value = a[kTransposed ? k * stride + ranks.first + rank : (ranks.first + rank) * p.k + k];
    acc = fmaf(x, tile::widen(value), acc);
  }
  for (int offset = 16; offset > 0; offset /= 2) acc += __shfl_xor_sync(0xFFFFFFFFu, acc, offset);
  return acc;
}

// Stores kTokens tokens' products with their adapters, `of` [token], for the 16 ranks from rank0 on.
template <int kTokens, class T>
__device__ __forceinline__ void store_adapter_ranks(const AdapterLowRankArgs<T>& p, int64_t token0, int64_t rank0,
                                                    const int32_t* of, const T (*products)[kAdapterRanks]) {
  const int count = static_cast<int>(p.stacks.adapters.count);
  const int64_t stack_columns = count * p.padded_rank;
  for (int i = threadIdx.x; p.stack != nullptr && i < kTokens * kAdapterRanks * count; i += blockDim.x) {
    const int r = i % kAdapterRanks, e = i / kAdapterRanks % count, token = i / kAdapterRanks / count;
    if (token0 + token >= p.m) continue;
    p.stack[(token0 + token) * stack_columns + e * p.padded_rank + rank0 + r] =
        e == of[token] ? products[token][r] : T{};
  }
  for (int i = threadIdx.x; p.out != nullptr && i < kTokens * kAdapterRanks; i += blockDim.x) {
    const int r = i % kAdapterRanks, token = i / kAdapterRanks;
    if (token0 + token >= p.m || rank0 + r >= p.stacks.max_rank) continue;
    p.out[(token0 + token) * p.stacks.max_rank + rank0 + r] =
        of[token] == tile::kInvalidAdapter ? tile::narrow<T>(NAN) : products[token][r];
  }
}

// Grid: x over 8 tokens, y over 16 ranks. Requires k % 8 == 0, and x and a aligned to 16 bytes.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kLowRankThreads, tile::kFewRegisters ? 1 : 2)
    adapter_low_rank_kernel(const __grid_constant__ AdapterLowRankArgs<T> p) {
  constexpr int kSums = kAdapterTokens * kAdapterRanks;
  __shared__ float4 partial[kLowRankWarps][kSums / 4];
  __shared__ T products[kAdapterTokens][kAdapterRanks];
  __shared__ int32_t of[kAdapterTokens], experts[kAdapterTokens];
  const int64_t token0 = int64_t{blockIdx.x} * kAdapterTokens, rank0 = int64_t{blockIdx.y} * kAdapterRanks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < kAdapterTokens) {
    const int64_t token = token0 + threadIdx.x;
    of[threadIdx.x] = token < p.m ? adapter_of(p.stacks, token) : tile::kNoAdapter;
    experts[threadIdx.x] = static_cast<int32_t>(expert_of(p.stacks, token));
  }
  if (threadIdx.x < kSums) products[threadIdx.x / kAdapterRanks][threadIdx.x % kAdapterRanks] = T{};
  __syncthreads();

  for (int i = 0; i < kAdapterTokens; ++i) {
    const int32_t adapter = of[i], expert = experts[i];
    bool is_new = adapter >= 0;
    for (int j = 0; j < i; ++j) is_new = is_new && (of[j] != adapter || experts[j] != expert);
    if (!is_new) continue;
    const T* const a = own_matrix(p, expert);
    const auto is_own = [&](int token) { return of[token] == adapter && experts[token] == expert; };
    const tile::AdapterRanks ranks = ranks_of(p.stacks, adapter);
    if (rank0 >= ranks.count) continue;
    const Dropout dropout = dropout_of(p.stacks, adapter, p.dropout);
    const float factor = factor_of(p.stacks, adapter, p.dropout.keep_scale);
    if (kTransposed && ranks.count % 2 != 0) {  // low_rank.cuh has no mma for them
      for (int sum = warp; sum < kSums; sum += kLowRankWarps) {
        const int token = sum / kAdapterRanks, r = sum % kAdapterRanks;
        if (!is_own(token) || rank0 + r >= ranks.count) continue;
        const float v = adapter_sum<T, kTransposed>(p, a, ranks, dropout, token0 + token, rank0 + r);
        if (lane == 0) products[token][r] = tile::narrow<T>(v * factor);
      }
      continue;
    }
    const int splits = splits_of(p, ranks.count);
    float total = 0.0f;  // of a thread's own sum
    for (int split = 0; split < splits; ++split) {
      float acc[4] = {};
      add_adapter<T, kTransposed>(p, a, ranks, dropout, token0, rank0, 32 * (split * kLowRankWarps + warp),
                                  32 * kLowRankWarps * splits, acc);
      __syncthreads();  // the previous parts have been read
      partial[warp][lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
      __syncthreads();
      if (threadIdx.x >= kSums) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kLowRankWarps; ++w) sum += reinterpret_cast<const float*>(partial[w])[threadIdx.x];
      total = split == 0 ? sum : total + sum;
    }
    if (threadIdx.x >= kSums) continue;
    // As in store_low_rank: the accumulators of lane 4 g + t are rows g and g + 8 of the mma, columns 2t and 2t + 1.
    const int c = threadIdx.x % 4, g = threadIdx.x / 16, token = threadIdx.x / 4 % 4 * 2 + c % 2;
    const int r = kTransposed ? 2 * g + c / 2 : g + c / 2 * 8;
    if (is_own(token)) products[token][r] = tile::narrow<T>(total * factor);
  }
  __syncthreads();
  store_adapter_ranks<kAdapterTokens>(p, token0, rank0, of, products);
}

// For any type, shape and alignment. Grid: x over tokens, y over 16 ranks.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kLowRankScalarThreads)
    adapter_low_rank_scalar_kernel(const __grid_constant__ AdapterLowRankArgs<T> p) {
  __shared__ T products[1][kAdapterRanks];
  __shared__ int32_t of[1];
  const int64_t rank0 = int64_t{blockIdx.y} * kAdapterRanks;
  for (int64_t token = blockIdx.x; token < p.m; token += gridDim.x) {
    const int32_t adapter = adapter_of(p.stacks, token);
    __syncthreads();  // the previous token's products have been stored
    if (threadIdx.x == 0) of[0] = adapter;
    if (threadIdx.x < kAdapterRanks) products[0][threadIdx.x] = T{};
    __syncthreads();
    if (adapter >= 0) {
      const tile::AdapterRanks ranks = ranks_of(p.stacks, adapter);
      const Dropout dropout = dropout_of(p.stacks, adapter, p.dropout);
      const float factor = factor_of(p.stacks, adapter, p.dropout.keep_scale);
      const T* const a = own_matrix(p, expert_of(p.stacks, token));
      for (int r = threadIdx.x / 32; r < kAdapterRanks && rank0 + r < ranks.count; r += kLowRankScalarThreads / 32) {
        const float v = adapter_sum<T, kTransposed>(p, a, ranks, dropout, token, rank0 + r);
        if (threadIdx.x % 32 == 0) products[0][r] = tile::narrow<T>(v * factor);
      }
    }
    __syncthreads();
    store_adapter_ranks<1>(p, token, rank0, of, products);
  }
}

}  // namespace qlora::kernels
