// Loads from and stores to shared memory by 32-bit address. The caller computes one address (with prmt, for example),
// and the instruction itself adds the constant kOffset.
#pragma once

#include <cstdint>

namespace qlora::ptx {

template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_shared_u32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ uint2 load_shared_v2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(v.x), "=r"(v.y) : "r"(address), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ uint4 load_shared_v4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ float load_shared_f32(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(v) : "r"(address), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ float2 load_shared_v2_f32(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v.x), "=f"(v.y) : "r"(address), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ float4 load_shared_v4_f32(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared_f32(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0 + %1], %2;" ::"r"(address), "n"(kOffset), "f"(v) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared_u32(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0 + %1], %2;" ::"r"(address), "n"(kOffset), "r"(v) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared_v2_f32(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0 + %1], {%2, %3};" ::"r"(address), "n"(kOffset), "f"(v.x), "f"(v.y) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared_v2(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0 + %1], {%2, %3};" ::"r"(address), "n"(kOffset), "r"(v.x), "r"(v.y) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared_v4(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address), "n"(kOffset), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace qlora::ptx
