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

// Looks up the values of the two elements of byte kByte, and stores what finish(value) makes of them. `even` and `odd`
// hold four times the codes of the even and odd elements, one byte each. `table` is the shared address of the 16
// floats.
template <int kByte, class Finish>
__device__ __forceinline__ void decode_nf4_byte(float* out, uint32_t even, uint32_t odd, uint32_t table,
                                                const Finish& finish) {
  constexpr uint32_t kSelector = 0x7650u + kByte;  // bytes 1..3 of the table's address, then the offset
  out[0] = finish(ptx::load_shared_f32(ptx::prmt<kSelector>(even, table)));
  out[1] = finish(ptx::load_shared_f32(ptx::prmt<kSelector>(odd, table)));
}

// The same for the packed bytes of `word`, lowest first.
template <int kCount, class Finish>
__device__ __forceinline__ void decode_nf4(float (&out)[kCount], uint32_t word, uint32_t table, const Finish& finish) {
  static_assert(kCount == 4 || kCount == 8);
  constexpr uint32_t kTimesFour = 0x3C3C3C3Cu;
  const uint32_t even = (word >> 2) & kTimesFour;
  const uint32_t odd = (word << 2) & kTimesFour;
  decode_nf4_byte<0>(out, even, odd, table, finish);
  decode_nf4_byte<1>(out + 2, even, odd, table, finish);
  if constexpr (kCount == 8) {
    decode_nf4_byte<2>(out + 4, even, odd, table, finish);
    decode_nf4_byte<3>(out + 6, even, odd, table, finish);
  }
}

// The same without a table, for codes that ascend by 1: element q is finish(2^23 + q).
template <int kByte, class Finish>
__device__ __forceinline__ void decode_integers_byte(float* out, uint32_t even, uint32_t odd, const Finish& finish) {
  constexpr uint32_t kSelector = 0x7650u + kByte, kTwo23 = 0x4B000000u;
  out[0] = finish(ptx::prmt_f32<kSelector>(even, kTwo23));
  out[1] = finish(ptx::prmt_f32<kSelector>(odd, kTwo23));
}
template <int kCount, class Finish>
__device__ __forceinline__ void decode_integers(float (&out)[kCount], uint32_t word, const Finish& finish) {
  static_assert(kCount == 4 || kCount == 8);
  constexpr uint32_t kNibbles = 0x0F0F0F0Fu;
  const uint32_t even = (word >> 4) & kNibbles, odd = word & kNibbles;
  decode_integers_byte<0>(out, even, odd, finish);
  decode_integers_byte<1>(out + 2, even, odd, finish);
  if constexpr (kCount == 8) {
    decode_integers_byte<2>(out + 4, even, odd, finish);
    decode_integers_byte<3>(out + 6, even, odd, finish);
  }
}

}  // namespace qlora::tile
