// LoRA's gradients of several adapters are computed as those of experts: each adapter's tokens are copied one after the
// other, and its gradients come padded to the largest rank. The kernels here order the tokens, copy their rows and take
// the gradients apart. Over experts, each adapter of each expert is such a group: number expert · adapters + adapter.
#pragma once

#include <cstdint>

#include "cuda/tile/generic/adapters.cuh"
#include "cuda/tile/generic/dropout.cuh"

namespace qlora::kernels {

inline constexpr int kAdapterRowThreads = 256;

// Returns the number of a token's group, negative if it has none.
__device__ __forceinline__ int64_t adapter_group(const tile::AdapterStacks& s, int64_t token) {
  const int32_t adapter = adapter_of(s, token);
  return adapter < 0 ? adapter : expert_of(s, token) * s.adapters.count + adapter;
}

// Writes group blockIdx.x's tokens, in ascending order, after those of the groups before it, and where they end.
__global__ void __launch_bounds__(kAdapterRowThreads)
    order_adapter_rows_kernel(const __grid_constant__ tile::AdapterStacks stacks, int64_t m, int32_t* tokens,
                              int64_t* ends) {
  constexpr int kWarps = kAdapterRowThreads / 32;
  __shared__ int before, counts[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t group = blockIdx.x;
  if (threadIdx.x == 0) before = 0;
  __syncthreads();
  int mine = 0;
  for (int64_t i = threadIdx.x; i < m; i += kAdapterRowThreads) {
    const int64_t of = adapter_group(stacks, i);
    mine += 0 <= of && of < group;
  }
  if (mine > 0) atomicAdd(&before, mine);
  __syncthreads();
  int64_t at = before;
  for (int64_t first = 0; first < m; first += kAdapterRowThreads) {
    const int64_t token = first + threadIdx.x;
    const bool is_own = token < m && adapter_group(stacks, token) == group;
    const unsigned own = __ballot_sync(0xFFFFFFFFu, is_own);
    if (lane == 0) counts[warp] = __popc(own);
    __syncthreads();
    int earlier = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      earlier += w < warp ? counts[w] : 0;
      all += counts[w];
    }
    if (is_own) tokens[at + earlier + __popc(own & ((1u << lane) - 1))] = static_cast<int32_t>(token);
    at += all;
    __syncthreads();  // the counts have been read
  }
  if (threadIdx.x == 0) ends[group] = at;
}

template <class T>
struct AdapterRowArgs {
  tile::AdapterStacks stacks;
  const int32_t* tokens;    // in the order of their groups
  const int64_t* ends;      // [groups]: of the groups' tokens
  const T *x, *dy, *h, *g;  // h and g [m, max_rank]
  T *x_rows, *dy_rows, *h_rows, *g_rows;
  int64_t m, k, n;
  Dropout dropout;  // of x: dropped elements become zeros
};

// Grid: x strides over the tokens of all adapters.
template <class T>
__global__ void __launch_bounds__(kAdapterRowThreads)
    copy_adapter_tokens_kernel(const __grid_constant__ AdapterRowArgs<T> p) {
  const int64_t rows = p.ends[p.stacks.experts.count * p.stacks.adapters.count - 1], width = p.stacks.max_rank;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t token = p.tokens[row];
    const int32_t adapter = p.stacks.adapters.of_token[token];
    const int64_t ranks = ranks_of(p.stacks, adapter).count;
    const Dropout dropout = dropout_of(p.stacks, adapter, p.dropout);
    for (int64_t c = threadIdx.x; c < p.k; c += kAdapterRowThreads) {
      const int64_t index = token * p.k + c;
      const bool keeps = !dropout.active() || (tile::keep_mask<4>(dropout, index / 4 * 4) >> (index % 4) & 1);
      p.x_rows[row * p.k + c] = keeps ? p.x[index] : T{};
    }
    for (int64_t c = threadIdx.x; c < p.n; c += kAdapterRowThreads) p.dy_rows[row * p.n + c] = p.dy[token * p.n + c];
    for (int64_t r = threadIdx.x; r < width; r += kAdapterRowThreads) {
      p.h_rows[row * width + r] = r < ranks ? p.h[token * width + r] : T{};
      p.g_rows[row * width + r] = r < ranks ? p.g[token * width + r] : T{};
    }
  }
}

// da [stack_rank, k] and db [n, stack_rank], of each expert, from those of each group, [groups, max_rank, k] and
// [groups, n, max_rank]. Ranks that belong to no adapter get zeros. Grid: x over the columns k, then n, y strides over
// the ranks of all experts.
template <class T>
__global__ void __launch_bounds__(kAdapterRowThreads)
    unstack_gradients_kernel(const __grid_constant__ tile::AdapterStacks stacks, const T* of_a, const T* of_b, T* da,
                             T* db, int64_t n, int64_t k) {
  const int64_t column = int64_t{blockIdx.x} * kAdapterRowThreads + threadIdx.x, width = stacks.max_rank;
  if (column >= k + n) return;
  const int64_t ranks = stacks.adapters.stack_rank;
  for (int64_t row = blockIdx.y; row < stacks.experts.count * ranks; row += gridDim.y) {
    const int64_t expert = row / ranks, rank = row % ranks;
    T v{};
    for (int64_t adapter = 0; adapter < stacks.adapters.count; ++adapter) {
      const tile::AdapterRanks own = ranks_of(stacks, adapter);
      const int64_t r = rank - own.first, group = expert * stacks.adapters.count + adapter;
      if (r < 0 || r >= own.count) continue;
      v = column < k ? of_a[(group * width + r) * k + column] : of_b[(group * n + column - k) * width + r];
      break;
    }
    if (column < k)
      da[row * k + column] = v;
    else
      db[(expert * n + column - k) * ranks + rank] = v;
  }
}

}  // namespace qlora::kernels
