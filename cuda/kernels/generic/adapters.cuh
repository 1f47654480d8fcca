// Calls whose tokens use different adapters run on the kernels for one adapter: these see the adapters as a single one
// with all of their ranks, and a token's h or g is zero for the ranks of other adapters. The kernels here make that
// stack, and correct what zeros cannot express: 0 times an infinity or a NaN would reach the tokens of other adapters.
// Over experts, each expert has such a stack.
#pragma once

#include <cstdint>

#include "cuda/tile/generic/adapters.cuh"
#include "cuda/tile/generic/dropout.cuh"
#include "cuda/tile/generic/element.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

inline constexpr int kAdapterThreads = 256;

// Numbers the adapters of all experts, in the order of the experts: `to` gets the number of each token's adapter.
// Tokens of no expert have no adapter. Grid: x over tokens.
__global__ void __launch_bounds__(kAdapterThreads)
    number_adapters_kernel(const __grid_constant__ DeviceAdapters adapters, const __grid_constant__ tile::Groups groups,
                           int32_t* to) {
  const int64_t token = int64_t{blockIdx.x} * kAdapterThreads + threadIdx.x;
  if (token >= groups.rows) return;
  int64_t expert = 0;
  while (expert < groups.count && group_end(groups, expert) <= token) ++expert;
  const int32_t adapter = __ldg(adapters.of_token + token);
  if (expert == groups.count || adapter == tile::kNoAdapter)
    to[token] = tile::kNoAdapter;
  else if (adapter < 0 || adapter >= adapters.count)
    to[token] = tile::kInvalidAdapter;
  else
    to[token] = static_cast<int32_t>(expert * adapters.count + adapter);
}

// The matrix that h or g is multiplied by, and its padded stack: lora_b [experts, columns, ranks] or, for dX, lora_a
// [experts, ranks, columns].
template <class T>
struct AdapterProduct {
  tile::AdapterStacks stacks;
  const T* from;      // the adapters' own ranks
  T* stack;           // each adapter has padded_rank ranks
  const T* low_rank;  // h or g [m, count · padded_rank]
  T* out;             // [m, columns]
  int64_t m, columns, padded_rank;
  Dropout dropout;    // of the product
  uint32_t* flagged;  // set if there are values that are not finite, or tokens with an invalid adapter
};

// An adapter's own rank `r` in `from`.
template <bool kRanksFirst, class T>
__device__ __forceinline__ T own_rank(const AdapterProduct<T>& p, int64_t adapter, const tile::AdapterRanks& own,
                                      int64_t r, int64_t column) {
  return p.from[kRanksFirst ? (own.first + r) * p.columns + column
                            : b_index(p.stacks, adapter, own, column, p.columns) + r];
}

// Fills the stack, with zeros in place of values that are not finite and of ranks that do not exist. Clears `flagged`
// beforehand. Grid: x strides over the stack.
template <class T, bool kRanksFirst>
__global__ void __launch_bounds__(kAdapterThreads) stack_adapters_kernel(const __grid_constant__ AdapterProduct<T> p) {
  const int64_t first = int64_t{blockIdx.x} * kAdapterThreads + threadIdx.x,
                step = int64_t{gridDim.x} * kAdapterThreads;
  const int64_t ranks = p.stacks.adapters.count * p.padded_rank;  // of an expert
  bool flags = false;
#pragma unroll 1  // from 10.0 on, ptxas would spill registers around the divisions of several elements
  for (int64_t i = first; i < p.stacks.adapters.experts * ranks * p.columns; i += step) {
    const int64_t row = kRanksFirst ? i / p.columns : i / ranks, column = kRanksFirst ? i % p.columns : row % p.columns;
    const int64_t rank = kRanksFirst ? row : row / p.columns * ranks + i % ranks;  // among those of all experts
    const int64_t adapter = rank / p.padded_rank;
    const tile::AdapterRanks own = ranks_of(p.stacks, adapter);
    T v{};
    if (rank % p.padded_rank < own.count) v = own_rank<kRanksFirst>(p, adapter, own, rank % p.padded_rank, column);
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
    const int64_t count = p.stacks.adapters.count;
    const T* const low_rank = p.low_rank + (token * count + number_in_call(p.stacks, adapter)) * p.padded_rank;
    float sum = 0.0f;
    bool found = false;
    for (int64_t r = 0; r < own.count; ++r) {
      const float v = tile::widen(own_rank<kRanksFirst>(p, adapter, own, r, column));
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

// Copies the rows of `adapter`, of all experts. Grid: x over columns, y strides over tokens.
template <class T>
__global__ void __launch_bounds__(kAdapterThreads)
    copy_adapter_rows_kernel(const __grid_constant__ tile::AdapterStacks stacks, int64_t adapter, const T* from, T* to,
                             int64_t m, int64_t columns) {
  const int64_t column = int64_t{blockIdx.x} * kAdapterThreads + threadIdx.x;
  if (column >= columns) return;
  for (int64_t token = blockIdx.y; token < m; token += gridDim.y) {
    const int32_t of = adapter_of(stacks, token);
    if (of >= 0 && number_in_call(stacks, of) == adapter) to[token * columns + column] = from[token * columns + column];
  }
}

}  // namespace qlora::kernels
