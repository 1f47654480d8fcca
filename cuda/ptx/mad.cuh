// mad.lo.u32: one instruction, for which nvcc emits a shift and an addition.
#pragma once

#include <cstdint>

namespace qlora::ptx {

// a * kFactor + c
template <uint32_t kFactor>
__device__ __forceinline__ uint32_t mad(uint32_t a, uint32_t c) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "n"(kFactor), "r"(c));
  return d;
}

}  // namespace qlora::ptx
