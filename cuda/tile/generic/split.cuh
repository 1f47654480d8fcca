// Adds up sums that are split over CTAs, without float atomics. Each CTA of a tile writes its partial sum, and the CTA
// that arrives last adds all of them in the order of the splits. Which CTA arrives last differs from run to run, but
// the bits do not.
#pragma once

#include <cstdint>

namespace qlora::tile {

// Returns true in every thread of the CTA that arrives last of `splits` CTAs at `ticket`, which starts at 0. That CTA
// then sees everything that the others wrote to global memory before. Only one thread executes fences, one on each side
// of its atomic, and the barriers extend their effect to the whole CTA. So a CTA waits for two fences rather than two
// per warp. `arrived` is a word of shared memory.
__device__ __forceinline__ bool arrives_last(uint32_t* ticket, uint32_t splits, uint32_t* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *arrived = atomicAdd(ticket, 1u);
    __threadfence();
  }
  __syncthreads();
  return *arrived == splits - 1;
}
__device__ __forceinline__ bool arrives_last(uint32_t* ticket, uint32_t splits) {
  __shared__ uint32_t arrived;
  return arrives_last(ticket, splits, &arrived);
}

}  // namespace qlora::tile
