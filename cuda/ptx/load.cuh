// Loads of global memory that is constant while the kernel runs (ld.global.nc). Stream loads are for data that is used
// once: they bypass L1, which keeps room for data that is reused. The instruction itself adds kOffset bytes.
#pragma once

#include <cstdint>

namespace qlora::ptx {

template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_stream_u32(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1 + %2];" : "=r"(v) : "l"(p), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ uint32_t load_stream_u16(const void* p) {
  uint16_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1 + %2];" : "=h"(v) : "l"(p), "n"(kOffset));
  return v;
}

template <int kOffset = 0>
__device__ __forceinline__ uint4 load_stream_v4(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "n"(kOffset));
  return v;
}

// The same for data that several CTAs or warps read in neighbouring pieces: the whole 128-byte line is brought into L2
// at once.
template <int kOffset = 0>
__device__ __forceinline__ uint4 load_stream_line_v4(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "n"(kOffset));
  return v;
}

// Prefetches the line of `p` into L2. The address must be valid.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Loads two bytes whose neighbours are needed soon: they are cached in L1.
__device__ __forceinline__ uint32_t load_cached_u16(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

}  // namespace qlora::ptx
