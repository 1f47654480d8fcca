// bar.sync over a part of a CTA's warps.
#pragma once

namespace qlora::ptx {

// kBarrier is 1..15; __syncthreads() is 0. kThreads, whole warps, must all come.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

}  // namespace qlora::ptx
