// The vocabulary stream:: for AVX-512 with BF16: that of AVX-512, and products of bfloat16 pairs.
#pragma once

#include "cpp/cpu/isa/avx512/stream.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

// acc + a.low * b.low + a.high * b.high of bfloat16 in each lane, in float32; subnormal factors and sums count as zero.
inline Floats dot_bf16(Floats acc, Ints a, Ints b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
inline Ints upper_halves(Floats x) { return _mm512_srli_epi32(_mm512_castps_si512(x), 16); }

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
