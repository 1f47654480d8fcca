// Adds up sums that are split over the CTAs of a cluster: each CTA keeps its part in shared memory, and the others read
// it there. Nothing has to be cleared beforehand, and no part goes through global memory.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/cluster.cuh"

namespace qlora::tile {

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Returns the sum of the values at `part` in all CTAs, in the order of their ranks. Call after ptx::cluster_sync(). No
// CTA may exit before all have finished reading.
__device__ __forceinline__ float4 cluster_sum(const float4* part, unsigned ctas) {
  const uint32_t address = ptx::shared_address(part);
  float4 sum = ptx::load_cluster_v4_f32(address, 0);
  for (unsigned i = 1; i < ctas; ++i) sum = add(sum, ptx::load_cluster_v4_f32(address, i));
  return sum;
}

}  // namespace qlora::tile
