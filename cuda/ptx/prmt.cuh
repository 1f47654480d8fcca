// prmt.b32: builds a word from four bytes of the pair (low, high) (PTX ISA 9.7.9.7). Digit i of the selector names the
// source of byte i: 0..3 in `low`, 4..7 in `high`.
#pragma once

#include <cstdint>

namespace qlora::ptx {

template <uint32_t kSelector>
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "n"(kSelector));
  return d;
}

// The same for the bits of a float.
template <uint32_t kSelector>
__device__ __forceinline__ float prmt_f32(uint32_t low, uint32_t high) {
  float d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=f"(d) : "r"(low), "r"(high), "n"(kSelector));
  return d;
}

// The same with a selector that differs from lane to lane.
__device__ __forceinline__ uint32_t prmt(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
}

}  // namespace qlora::ptx
