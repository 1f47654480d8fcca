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

}  // namespace qlora::ptx
