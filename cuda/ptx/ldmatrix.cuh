// ldmatrix: a warp loads four 8 x 8 matrices of 16-bit elements from shared memory (PTX ISA 9.7.14.5.15, sm_75). Lane l
// passes the address of row l % 8 of matrix l / 8, which has 16 bytes.
#pragma once

#include <cstdint>

namespace qlora::ptx {

// Lane (g, t) gets elements 2t and 2t + 1 of row g of each matrix, with the first in the lower half.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_x4(uint32_t address, uint32_t& m0, uint32_t& m1, uint32_t& m2, uint32_t& m3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
               : "r"(address), "n"(kOffset));
}

// Transposed: lane (g, t) gets column g of rows 2t and 2t + 1 of each matrix, with the first row in the lower half.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t address, uint32_t& m0, uint32_t& m1, uint32_t& m2,
                                                  uint32_t& m3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
               : "r"(address), "n"(kOffset));
}

}  // namespace qlora::ptx
