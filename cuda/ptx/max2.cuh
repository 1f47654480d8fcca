// The larger of each half of two registers, whose sign bits are 0; a NaN in either gives NaN (PTX ISA 9.7.4.10, sm_80).
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"

namespace qlora::ptx {

#if __CUDA_ARCH__ >= 800

template <class T>
__device__ __forceinline__ uint32_t max2_nan(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t max2_nan<bfloat16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <>
__device__ __forceinline__ uint32_t max2_nan<float16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

#else

// Without sign bits, floating-point numbers order like integers, with NaN above all others.
template <class T>
__device__ __forceinline__ uint32_t max2_nan(uint32_t a, uint32_t b) {
  constexpr uint32_t kLow = 0x0000FFFFu, kHigh = 0xFFFF0000u;
  return max(a & kLow, b & kLow) | max(a & kHigh, b & kHigh);
}

#endif

}  // namespace qlora::ptx
