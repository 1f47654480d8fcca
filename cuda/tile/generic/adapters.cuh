// The adapter of a token, in calls whose tokens use different ones. The host cannot check the numbers that name them
// and their ranks. So they are checked here, and no kernel leaves the stacks whatever they are.
#pragma once

#include <cstdint>

#include "cpp/format/device_adapters.h"
#include "cpp/format/philox.h"

namespace qlora::tile {

// Over experts, adapter i of expert e has the number e · count + i, and of_token has such numbers.
struct AdapterStacks {
  DeviceAdapters adapters;  // stack_rank is the sum of the ranks in lora_a and lora_b of one expert
  int64_t max_rank;         // the width of h and g

  QLORA_HD int64_t all() const { return adapters.experts * adapters.count; }
};

// An adapter's ranks in the stacks, [experts · stack_rank].
struct AdapterRanks {
  int64_t first, count;
};

inline constexpr int32_t kNoAdapter = -1, kInvalidAdapter = -2;

// Returns the adapter's number among those of its expert.
__device__ __forceinline__ int32_t number_in_call(const AdapterStacks& s, int64_t adapter) {
  return static_cast<int32_t>(adapter) % static_cast<int32_t>(s.adapters.count);
}

// Returns the number of a token's adapter or kNoAdapter; or kInvalidAdapter if there is no such adapter, or if its
// ranks are not within the stacks.
__device__ __forceinline__ int32_t adapter_of(const AdapterStacks& s, int64_t token) {
  const int32_t adapter = __ldg(s.adapters.of_token + token);
  if (adapter == kNoAdapter) return adapter;
  if (adapter < 0 || adapter >= s.all()) return kInvalidAdapter;
  const int32_t* const at = s.adapters.rank_offsets + number_in_call(s, adapter);
  const int64_t first = __ldg(at), end = __ldg(at + 1);
  const bool fits = 0 <= first && first <= end && end <= s.adapters.stack_rank && end - first <= s.max_rank;
  return fits ? adapter : kInvalidAdapter;
}

__device__ __forceinline__ int64_t clamp(int64_t v, int64_t least, int64_t most) {
  return v < least ? least : v > most ? most : v;
}

__device__ __forceinline__ AdapterRanks ranks_of(const AdapterStacks& s, int64_t adapter) {
  const int32_t* const at = s.adapters.rank_offsets + number_in_call(s, adapter);
  const int64_t first = clamp(__ldg(at), 0, s.adapters.stack_rank);
  const int64_t end = clamp(__ldg(at + 1), first, s.adapters.stack_rank);
  return {adapter / s.adapters.count * s.adapters.stack_rank + first, clamp(end - first, 0, s.max_rank)};
}

// Returns where lora_b [experts, n, stack_rank], or its gradient, has a row of an adapter's ranks.
__device__ __forceinline__ int64_t b_index(const AdapterStacks& s, int64_t adapter, const AdapterRanks& ranks,
                                           int64_t row, int64_t n) {
  // ranks.first counts those of the experts before, too
  return ranks.first + (adapter / s.adapters.count * (n - 1) + row) * s.adapters.stack_rank;
}

// As the host computes it for a call with one adapter.
__device__ __forceinline__ float factor_of(const AdapterStacks& s, int64_t adapter, double keep_scale) {
  const int32_t i = number_in_call(s, adapter);
  const double scaling = s.adapters.scalings != nullptr ? s.adapters.scalings[i] : s.adapters.scalings64[i];
  return static_cast<float>(scaling * keep_scale);
}

__device__ __forceinline__ Dropout dropout_of(const AdapterStacks& s, int64_t adapter, Dropout dropout) {
  if (s.adapters.seeds != nullptr) dropout.device_seed = s.adapters.seeds + number_in_call(s, adapter);
  return dropout;
}

}  // namespace qlora::tile
