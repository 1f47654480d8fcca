// No instruction at all: the compiler must have the values in registers here and may assume nothing about them.
#pragma once

#include <cstdint>

namespace qlora::ptx {

__device__ __forceinline__ void hold(float (&v)[4]) {
  asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]));
}

// What the compiler would otherwise compute anew wherever it is used, in a loop too.
__device__ __forceinline__ void hold(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void hold(int& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void hold(int64_t& v) { asm volatile("" : "+l"(v)); }
template <class T>
__device__ __forceinline__ void hold(T*& v) {
  asm volatile("" : "+l"(v));
}
__device__ __forceinline__ void hold(uint64_t& v) { asm volatile("" : "+l"(v)); }

}  // namespace qlora::ptx
