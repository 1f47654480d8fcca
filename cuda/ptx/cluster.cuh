// Thread block clusters: a barrier over their CTAs, and loads from each other's shared memory (PTX ISA 9.7.13.4 and
// 9.7.9.8 to 9.7.9.24, sm_90). A launch that asks for no clusters has clusters of one CTA, and so has everything that
// is compiled for less than sm_90.
#pragma once

#include <cstdint>

namespace qlora::ptx {

// Every thread of every CTA of the cluster; what they wrote before is seen after.
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

// 16 bytes at this CTA's shared address `address`, but of the CTA that is number `rank` of the cluster.
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
