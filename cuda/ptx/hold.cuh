// No instruction at all: the compiler must have the values in registers here and may assume nothing about them.
#pragma once

namespace qlora::ptx {

__device__ __forceinline__ void hold(float (&v)[4]) {
  asm volatile("" : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]));
}

}  // namespace qlora::ptx
