// mma.sync m16n8k8 on tf32: d += a [16 x 8, row] · b [8 x 8, col] (PTX ISA 9.7.14.5.8, sm_80). A tf32 is a float32 with
// 10 mantissa bits, in the upper 19 of 32 bits.
//
// Lane (g = lane / 4, t = lane % 4) holds
//   a0 = a[g][t], a1 = a[g+8][t], a2 = a[g][t+4], a3 = a[g+8][t+4];  b0 = b[t][g], b1 = b[t+4][g]
//   d0, d1 = d[g][2t, 2t+1], d2, d3 = d[g+8][2t, 2t+1]
#pragma once

#include <cstdint>

namespace qlora::ptx {

// Truncates v to tf32.
__device__ __forceinline__ float truncate_tf32(float v) { return __uint_as_float(__float_as_uint(v) & 0xFFFFE000u); }

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], float a0, float a1, float a2, float a3, float b0,
                                                 float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

}  // namespace qlora::ptx
