// What kernels have to know about the architecture that is being compiled. Kernels of tiles beyond its limits are
// empty: they are never launched, because cuda/tuning chooses other tiles.
#pragma once

#include "cuda/ptx/hold.cuh"

namespace qlora::tile {

#if defined(__CUDA_ARCH__)
inline constexpr int kArch = __CUDA_ARCH__;
#else
inline constexpr int kArch = 0;
#endif

inline constexpr int kMostSharedBytes = (kArch >= 1200 ? 99 : 227) * 1024;  // dynamic shared memory of a CTA

// From 10.0 on, ptxas needs more registers for the same code. Kernels that would spill them there have a form that
// needs fewer.
inline constexpr bool kFewRegisters = kArch >= 1000;
inline constexpr int kMostFewTokens = kFewRegisters ? 8 : 16;  // of the forward for few tokens

// Returns threadIdx.x. Where registers are few, nothing that was derived from it earlier stays in one until this call.
// The type is the one with which ptxas spills nothing in linear_sum.cuh: signed divisions take more registers on 9.0,
// and unsigned ones on 10.0.
__device__ __forceinline__ auto thread_index() {
  if constexpr (kFewRegisters)
    return static_cast<int>(ptx::reread_thread_index());
  else
    return threadIdx.x;
}

}  // namespace qlora::tile
