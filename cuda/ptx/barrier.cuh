// bar.sync: a barrier over some of a CTA's warps.
#pragma once

namespace qlora::ptx {

// kBarrier is 1..15; 0 is the barrier of __syncthreads(). kThreads is the number of threads that take part, in whole
// warps.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// The same for a barrier of a number that the warp computes.
template <int kThreads>
__device__ __forceinline__ void barrier_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

}  // namespace qlora::ptx
