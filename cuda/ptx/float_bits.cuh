// Float32 arithmetic whose operand or result is used as an integer. In C++, nvcc moves the value between its two
// register classes each time. PTX's untyped registers need no move. Each operation rounds once, to nearest even.
#pragma once

#include <cstdint>

namespace qlora::ptx {

// Returns the float whose bits are `a`, times b.
__device__ __forceinline__ float mul_bits(uint32_t a, float b) {
  float d;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(d) : "r"(a), "f"(b));
  return d;
}

// The bits of a * b + c, rounded once.
__device__ __forceinline__ uint32_t fma_to_bits(float a, float b, float c) {
  uint32_t d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=r"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// a * b + c, rounded once, then clamped to [0, 1]; 0 for NaN.
__device__ __forceinline__ float fma_saturated(float a, float b, float c) {
  float d;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// Returns all ones if a > b, and 0 otherwise.
__device__ __forceinline__ uint32_t greater_mask(float a, float b) {
  uint32_t d;
  asm("set.gt.u32.f32 %0, %1, %2;" : "=r"(d) : "f"(a), "f"(b));
  return d;
}

// Returns sum + kTerm if a > b, and sum otherwise.
template <uint32_t kTerm>
__device__ __forceinline__ uint32_t add_where_greater(float a, float b, uint32_t sum) {
  asm("{\n\t.reg .pred p;\n\tsetp.gt.f32 p, %1, %2;\n\t@p add.u32 %0, %0, %3;\n\t}"
      : "+r"(sum)
      : "f"(a), "f"(b), "n"(kTerm));
  return sum;
}

}  // namespace qlora::ptx
