// Sums split over CTAs without float atomics: each CTA of a tile writes its partial sum, the last one to arrive adds
// all of them in the order of the splits. Which one that is changes from run to run, the bits do not.
#pragma once

#include <cstdint>

namespace qlora::tile {

// True in every thread of the CTA that arrives last of `splits` at `counter`, which starts at 0. Everything that the
// CTAs wrote to global memory before is then visible. `flag` is a word of shared memory that nothing else uses.
__device__ __forceinline__ bool arrives_last(uint32_t* counter, uint32_t splits, uint32_t* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u);
  __syncthreads();
  const bool last = *flag + 1 == splits;
  if (last) __threadfence();
  return last;
}

}  // namespace qlora::tile
