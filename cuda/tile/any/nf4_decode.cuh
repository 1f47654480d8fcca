// Decodes by lookup in 16 floats of shared memory. They lie in 16 banks, so a warp's gather has no bank conflicts.
#pragma once

#include <cstdint>

#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/ptx/shared.cuh"

namespace qlora::tile {

// The shared table's alignment. It makes the low byte of the table's address zero, and prmt replaces that byte by four
// times the code.
inline constexpr int kNf4DecodeAlign = 256;

// Decodes the two elements of byte kByte: value times `scale`, each rounded once. `even` and `odd` hold four times the
// codes of the even and odd elements, one byte each. `table` is the shared address of the 16 floats.
template <int kByte>
__device__ __forceinline__ void decode_nf4_byte(float* out, uint32_t even, uint32_t odd, float scale, uint32_t table) {
  constexpr uint32_t kSelector = 0x7650u + kByte;  // bytes 1..3 of the table's address, then the offset
  out[0] = __fmul_rn(ptx::load_shared_f32(ptx::prmt<kSelector>(even, table)), scale);
  out[1] = __fmul_rn(ptx::load_shared_f32(ptx::prmt<kSelector>(odd, table)), scale);
}

// The same for the packed bytes of `word`, lowest first.
template <int kCount>
__device__ __forceinline__ void decode_nf4(float (&out)[kCount], uint32_t word, float scale, uint32_t table) {
  static_assert(kCount == 4 || kCount == 8);
  constexpr uint32_t kTimesFour = 0x3C3C3C3Cu;
  const uint32_t even = (word >> 2) & kTimesFour;
  const uint32_t odd = (word << 2) & kTimesFour;
  decode_nf4_byte<0>(out, even, odd, scale, table);
  decode_nf4_byte<1>(out + 2, even, odd, scale, table);
  if constexpr (kCount == 8) {
    decode_nf4_byte<2>(out + 4, even, odd, scale, table);
    decode_nf4_byte<3>(out + 6, even, odd, scale, table);
  }
}

}  // namespace qlora::tile
