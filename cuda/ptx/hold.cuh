// Emits no instruction, but makes the compiler hold a value in a register at this point and assume nothing about it.
#pragma once

#include <cstdint>

namespace qlora::ptx {

__device__ __forceinline__ void hold(float (&v)[4]) {
  asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]));
}

// Use it for values that the compiler would otherwise recompute at each use, even within a loop.
__device__ __forceinline__ void hold(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void hold(int& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void hold(int64_t& v) { asm volatile("" : "+l"(v)); }
template <class T>
__device__ __forceinline__ void hold(T*& v) {
  asm volatile("" : "+l"(v));
}
__device__ __forceinline__ void hold(uint64_t& v) { asm volatile("" : "+l"(v)); }

// Returns threadIdx.x. The compiler does not know that, and does not keep in registers what it has derived from it
// before.
__device__ __forceinline__ unsigned reread_thread_index() {
  unsigned v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}

}  // namespace qlora::ptx
