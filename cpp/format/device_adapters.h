// The adapters of a CUDA call whose tokens use different ones.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"

namespace qlora {

// All data is in device memory and never read by the host, which knows only the number of adapters, the sum of their
// ranks and the largest rank: the rank of the call's Lora, whose a and b are the stacks. Over experts, the adapters of
// each have stacks of their own, [experts, stack_rank, k] and [experts, n, stack_rank].
struct DeviceAdapters : Adapters {
  int64_t experts = 1;
  const int32_t* rank_offsets = nullptr;  // [count + 1]
  const float* scalings = nullptr;        // [count], or null: they are float64
  const double* scalings64 = nullptr;
  const int64_t* seeds = nullptr;  // [count], or null: the seed of the call's dropout
};

}  // namespace qlora
