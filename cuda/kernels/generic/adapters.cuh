// Calls whose tokens use different adapters run on the kernels for one adapter: these see the adapters as a single one
// with all of their ranks, and a token's h or g is zero for the ranks of other adapters. The kernels here make that
// stack, and correct what zeros cannot express: 0 times an infinity or a NaN would reach the tokens of other adapters.
#pragma once

#include <cstdint>

#include "cuda/tile/generic/adapters.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"

namespace qlora::kernels {

inline constexpr int kAdapterThreads = 256;

// The matrix that h or g is multiplied by, and its padded stack: lora_b [columns, ranks] or, for dX, lora_a [ranks,
// columns].
template <class T>
struct AdapterProduct {
  tile::AdapterStacks stacks;
  const T* from;      // the adapters' own ranks, of each expert
  T* stack;           // of each expert, in which each adapter has padded_rank ranks
  const T* low_rank;  // h or g [m, count · padded_rank]
  T* out;             // [m, columns]
  int64_t m, columns, padded_rank;
  Dropout dropout;    // of the product
  uint32_t* flagged;  // set if there are values that are not finite, or tokens with an invalid adapter
};

template <bool kRanksFirst, class T>
__device__ __forceinline__ int64_t product_index(const AdapterProduct<T>& p, int64_t rank, int64_t ranks,
                                                 int64_t column) {
  return kRanksFirst ? rank * p.columns + column : column * ranks + rank;
}

// An expert's part of `from`.
template <class T>
__device__ __forceinline__ const T* own_ranks(const AdapterProduct<T>& p, int64_t expert) {
  return p.from + expert * p.stacks.adapters.stack_rank * p.columns;
}

// Fills the stack, with zeros in place of values that are not finite and of ranks that do not exist. Clears `flagged`
// beforehand. Grid: x strides over the stack.
template <class T, bool kRanksFirst>
__global__ void __launch_bounds__(kAdapterThreads) stack_adapters_kernel(const __grid_constant__ AdapterProduct<T> p) {
  const int64_t first = int64_t{blockIdx.x} * kAdapterThreads + threadIdx.x,
                step = int64_t{gridDim.x} * kAdapterThreads;
  const int64_t ranks = p.stacks.adapters.count * p.padded_rank;
  bool flags = false;
#pragma unroll 1  // from 10.0 on, ptxas would spill registers around the divisions of several elements
  for (int64_t i = first; i < p.stacks.experts.count * ranks * p.columns; i += step) {
    const int64_t row = kRanksFirst ? i / p.columns : i / ranks, of_expert = kRanksFirst ? ranks : p.columns;
    const int64_t rank = kRanksFirst ? row % ranks : i % ranks, column = kRanksFirst ? i % p.columns : row % p.columns;
    const tile::AdapterRanks own = ranks_of(p.stacks, rank / p.padded_rank);
    T v{};
    if (rank % p.padded_rank < own.count)
      v = own_ranks(p, row / of_expert)[product_index<kRanksFirst>(p, own.first + rank % p.padded_rank,
                                                                   p.stacks.adapters.stack_rank, column)];
    if (!isfinite(tile::widen(v))) v = T{}, flags = true;
    p.stack[i] = v;
  }
  for (int64_t i = first; i < p.m; i += step) flags = flags || adapter_of(p.stacks, i) == tile::kInvalidAdapter;
  if (flags) atomicOr(p.flagged, 1u);
}

// Adds the products with values that are not finite to the tokens that use them, and gives tokens with an invalid
// adapter NaN. Grid: x over columns, y strides over tokens.
template <class T, bool kRanksFirst>
__global__ void __launch_bounds__(kAdapterThreads) finish_adapters_kernel(const __grid_constant__ AdapterProduct<T> p) {
  if (*p.flagged == 0) return;
  const int64_t column = int64_t{blockIdx.x} * kAdapterThreads + threadIdx.x;
  if (column >= p.columns) return;
  for (int64_t token = blockIdx.y; token < p.m; token += gridDim.y) {
    const int32_t adapter = adapter_of(p.stacks, token);
    const int64_t index = token * p.columns + column;
    if (adapter == tile::kInvalidAdapter) p.out[index] = tile::narrow<T>(NAN);
    if (adapter < 0) continue;
    const tile::AdapterRanks own = ranks_of(p.stacks, adapter);
    const T* const from = own_ranks(p, expert_of(p.stacks, token));
    const T* const low_rank = p.low_rank + (token * p.stacks.adapters.count + adapter) * p.padded_rank;
    float sum = 0.0f;
    bool found = false;
    for (int64_t r = 0; r < own.count; ++r) {
      const float v =
          tile::widen(from[product_index<kRanksFirst>(p, own.first + r, p.stacks.adapters.stack_rank, column)]);
      if (isfinite(v)) continue;
      found = true;
      sum = fmaf(tile::widen(low_rank[r]), v, sum);
    }
    if (!found) continue;
    if (p.dropout.active()) {
      const Dropout dropout = dropout_of(p.stacks, adapter, p.dropout);
      if (!(tile::keep_mask<4>(dropout, index / 4 * 4) >> (index % 4) & 1)) continue;
    }
    p.out[index] = tile::narrow<T>(tile::widen(p.out[index]) + sum);
  }
}

// Copies the rows of `adapter`. Grid: x over columns, y strides over tokens.
template <class T>
__global__ void __launch_bounds__(kAdapterThreads)
    copy_adapter_rows_kernel(const int32_t* of_token, int64_t adapter, const T* from, T* to, int64_t m,
                             int64_t columns) {
  const int64_t column = int64_t{blockIdx.x} * kAdapterThreads + threadIdx.x;
  if (column >= columns) return;
  for (int64_t token = blockIdx.y; token < m; token += gridDim.y)
    if (of_token[token] == adapter) to[token * columns + column] = from[token * columns + column];
}

}  // namespace qlora::kernels
