// ldmatrix: lane i gives the shared address of a 16-byte row; matrix j takes rows of lanes 8j..8j+7, and lane (g, t)
// gets elements 2t, 2t+1 of row g. `trans` gives elements (2t, g), (2t+1, g) instead (PTX ISA 9.7.14.5.15, sm_75).
#pragma once

#include <cstdint>

namespace qlora::ptx {

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(row));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row));
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "r"(row));
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row));
}

}  // namespace qlora::ptx
