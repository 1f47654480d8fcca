// Rounding to bfloat16 as from_float does it (cpp/format/dtypes.h), for every vocabulary of AVX2.
#pragma once

#include <immintrin.h>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// The bits of each lane rounded to nearest even, in the low half of the lane. A NaN stays one, and becomes quiet.
inline __m256i bfloat16_bits(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i tie_to_even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), tie_to_even);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
}
// The same, as words.
inline __m128i round_to_bfloat16(__m256 x) {
  const __m256i bits = bfloat16_bits(x);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
