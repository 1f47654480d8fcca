// Rounding to bfloat16 as from_float does it (cpp/format/dtypes.h), for every vocabulary of AVX-512.
#pragma once

#include <immintrin.h>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Each lane rounded to nearest even; a NaN stays one, and becomes quiet. It is done in integers: vcvtneps2bf16 is not
// everywhere, and flushes subnormals.
inline __m256i round_to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  const __m512i tie_to_even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), tie_to_even);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, high, _mm512_set1_epi32(0x40)));
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
