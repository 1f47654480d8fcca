// The adapter of a token, in calls whose tokens use different ones. Over experts, every expert has each adapter: stacks
// a [experts, stack_rank, k] and b [experts, n, stack_rank]. The host cannot check the numbers that name them
// and their ranks. So they are checked here, and no kernel leaves the stacks whatever they are.
#pragma once

#include <cstdint>

#include "cpp/format/device_adapters.h"
#include "cpp/format/philox.h"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::tile {

struct AdapterStacks {
  DeviceAdapters adapters;           // stack_rank is the sum of the ranks in lora_a and lora_b
  int64_t max_rank;                  // the width of h and g
  Groups experts = {nullptr, 1, 0};  // without offsets: one weight
};

// An adapter's ranks in the stacks.
struct AdapterRanks {
  int64_t first, count;
};

inline constexpr int32_t kNoAdapter = -1, kInvalidAdapter = -2;

__device__ __forceinline__ bool is_over_experts(const AdapterStacks& s) {
  return s.experts.offsets != nullptr || s.experts.count == 0;
}

// Returns the number of a token's expert, 0 over one weight: the first one that ends after the token.
__device__ __forceinline__ int64_t expert_of(const AdapterStacks& s, int64_t token) {
  int64_t expert = 0;
  if (!is_over_experts(s)) return expert;
  while (expert < s.experts.count && group_end(s.experts, expert) <= token) ++expert;
  return expert;
}

// Returns the number of a token's adapter; kNoAdapter, also for a token that belongs to no expert; or kInvalidAdapter
// if there is no such adapter, or if its ranks are not within the stacks.
__device__ __forceinline__ int32_t adapter_of(const AdapterStacks& s, int64_t token) {
  const int32_t adapter = __ldg(s.adapters.of_token + token);
  if (adapter == kNoAdapter || (is_over_experts(s) && expert_of(s, token) == s.experts.count)) return kNoAdapter;
  if (adapter < 0 || adapter >= s.adapters.count) return kInvalidAdapter;
  const int64_t first = __ldg(s.adapters.rank_offsets + adapter), end = __ldg(s.adapters.rank_offsets + adapter + 1);
  const bool fits = 0 <= first && first <= end && end <= s.adapters.stack_rank && end - first <= s.max_rank;
  return fits ? adapter : kInvalidAdapter;
}

__device__ __forceinline__ int64_t clamp(int64_t v, int64_t least, int64_t most) {
  return v < least ? least : v > most ? most : v;
}

__device__ __forceinline__ AdapterRanks ranks_of(const AdapterStacks& s, int64_t adapter) {
  const int64_t first = clamp(__ldg(s.adapters.rank_offsets + adapter), 0, s.adapters.stack_rank);
  const int64_t end = clamp(__ldg(s.adapters.rank_offsets + adapter + 1), first, s.adapters.stack_rank);
  return {first, clamp(end - first, 0, s.max_rank)};
}

// As the host computes it for a call with one adapter.
__device__ __forceinline__ float factor_of(const AdapterStacks& s, int64_t adapter, double keep_scale) {
  const double scaling = s.adapters.scalings != nullptr ? s.adapters.scalings[adapter] : s.adapters.scalings64[adapter];
  return static_cast<float>(scaling * keep_scale);
}

__device__ __forceinline__ Dropout dropout_of(const AdapterStacks& s, int64_t adapter, Dropout dropout) {
  if (s.adapters.seeds != nullptr) dropout.device_seed = s.adapters.seeds + adapter;
  return dropout;
}

}  // namespace qlora::tile
