// What kernels have to know about the architecture that is being compiled.
#pragma once

#include "cuda/ptx/hold.cuh"

namespace qlora::tile {

#if defined(__CUDA_ARCH__)
inline constexpr int kArch = __CUDA_ARCH__;
#else
inline constexpr int kArch = 0;
#endif

// Dynamic shared memory of a CTA. Kernels of tiles that need more are empty: they are never launched.
inline constexpr int kMostSharedBytes = (kArch >= 1200 ? 99 : 227) * 1024;

// From 10.0 on, ptxas needs more registers for the same code. Kernels that would spill them there have a form that needs
// fewer and executes more instructions.
inline constexpr bool kFewRegisters = kArch >= 1000;

// Returns threadIdx.x. Where registers are few, nothing that was derived from it earlier stays in one until this call.
__device__ __forceinline__ unsigned thread_index() {
  if constexpr (kFewRegisters)
    return ptx::reread_thread_index();
  else
    return threadIdx.x;
}

}  // namespace qlora::tile
