// Thread block clusters: a barrier over their CTAs, and loads from each other's shared memory (PTX ISA 9.7.13.4 and
// 9.7.9.8 to 9.7.9.24, sm_90). A launch without clusters has clusters of one CTA, and so has all code compiled for less
// than sm_90.
#pragma once

#include <cstdint>

namespace qlora::ptx {

// A barrier over every thread of every CTA in the cluster. Earlier writes are visible afterwards.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// Loads 16 bytes from the shared memory of the cluster's CTA `rank`. `address` is the address of the same place in this
// CTA.
__device__ __forceinline__ float4 load_cluster_v4_f32(uint32_t address, uint32_t rank) {
  float4 v;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %4, %5;\n\t"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n\t}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
#else
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
#endif
  return v;
}

}  // namespace qlora::ptx
