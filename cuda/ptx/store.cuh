// Stores of results to global memory. Stream stores (st.global.cs) are for results that are not read soon, and mark
// their lines for early eviction. The instruction itself adds kOffset bytes.
#pragma once

#include <cstdint>

namespace qlora::ptx {

// nvcc splits an assignment to a uint2 into two stores, each of which writes half of every sector.
__device__ __forceinline__ void store_v2(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_v4(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(p), "n"(kOffset), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_stream_u32(void* p, uint32_t v) {
  asm volatile("st.global.cs.u32 [%0 + %1], %2;" ::"l"(p), "n"(kOffset), "r"(v) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_stream_u16(void* p, uint32_t v) {
  asm volatile("st.global.cs.u16 [%0 + %1], %2;" ::"l"(p), "n"(kOffset), "h"(static_cast<uint16_t>(v)) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_stream_v4(void* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(p), "n"(kOffset), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

}  // namespace qlora::ptx
