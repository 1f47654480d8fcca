// lop3.b32: any bitwise function of three words in one instruction (PTX ISA 9.7.8.6).
#pragma once

#include <cstdint>

namespace qlora::ptx {

// (value & mask) | base
__device__ __forceinline__ uint32_t and_or(uint32_t value, uint32_t mask, uint32_t base) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(value), "r"(mask), "r"(base));
  return d;
}

// (~value & mask) | base
__device__ __forceinline__ uint32_t andnot_or(uint32_t value, uint32_t mask, uint32_t base) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xAE;" : "=r"(d) : "r"(value), "r"(mask), "r"(base));
  return d;
}

// Takes the bits of `a` where `mask` is 1, and those of `b` where it is 0.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

}  // namespace qlora::ptx
