// NF4 decode by lookup in 16 floats of shared memory: 16 banks, so a warp's gather never conflicts.
#pragma once

#include <cstdint>

#include "cpp/format/nf4.h"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"

namespace qlora::cuda {

// The shared table's alignment: its address has a zero low byte, which prmt replaces by four times the code.
inline constexpr int kNf4DecodeAlign = 256;

// The values of elements 0 .. kCount-1 of the packed bytes in `word` (lowest byte first), times `scale`, each rounded
// once. `table` is the shared address of 16 floats.
template <int kCount>
__device__ __forceinline__ void decode_nf4(float (&out)[kCount], uint32_t word, float scale, uint32_t table) {
  static_assert(kCount % 2 == 0 && kCount <= 8);
  constexpr uint32_t kTimesFour = 0x3C3C3C3Cu;  // a byte's code, already a byte offset into the table
  const uint32_t even = (word >> 2) & kTimesFour;
  const uint32_t odd = (word << 2) & kTimesFour;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    const uint32_t byte = 0x7650u + i / 2;  // bytes 1..3 of the table's address, then byte i/2 of the offsets
    out[i] = __fmul_rn(ptx::load_shared_f32(ptx::prmt(even, table, byte)), scale);
    out[i + 1] = __fmul_rn(ptx::load_shared_f32(ptx::prmt(odd, table, byte)), scale);
  }
}

}  // namespace qlora::cuda
