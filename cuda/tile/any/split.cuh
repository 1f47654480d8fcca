// Sums split over CTAs without float atomics: each CTA of a tile writes its partial sum, the last one to arrive adds
// all of them in the order of the splits. Which one that is changes from run to run, the bits do not.
#pragma once

#include <cstdint>

namespace qlora::tile {

// True in every thread of the CTA that arrives last of `splits` at `ticket`, which starts at 0. It then sees
// everything that the others wrote to global memory before: the barriers pass on what one thread's fences order, on
// both sides of its atomic, so that a CTA waits for two fences and not for two of each warp.
__device__ __forceinline__ bool arrives_last(uint32_t* ticket, uint32_t splits) {
  __shared__ uint32_t arrived;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    arrived = atomicAdd(ticket, 1u);
    __threadfence();
  }
  __syncthreads();
  return arrived == splits - 1;
}

}  // namespace qlora::tile
