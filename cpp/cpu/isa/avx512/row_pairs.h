// stream::'s words for weight rows in pairs, for AVX-512. scalar/row_pairs.h says what each name means.
#pragma once

#include "cpp/cpu/isa/avx512/stream.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

inline constexpr int kMaxDxTokens = 16;

inline Ints load_row_pair(const uint8_t* upper, const uint8_t* lower) {
  alignas(64) static constexpr uint8_t kInterleave[64] = {
      0,  1,  32, 33, 2,  3,  34, 35, 4,  5,  36, 37, 6,  7,  38, 39, 8,  9,  40, 41, 10, 11,
      42, 43, 12, 13, 44, 45, 14, 15, 46, 47, 16, 17, 48, 49, 18, 19, 50, 51, 20, 21, 52, 53,
      22, 23, 54, 55, 24, 25, 56, 57, 26, 27, 58, 59, 28, 29, 60, 61, 30, 31, 62, 63};
  const Ints both =
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper))),
                         _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower)), 1);
  return _mm512_permutexvar_epi8(_mm512_load_si512(kInterleave), both);
}
template <int s>
inline Ints decode_nibble(Ints words, const IntCodebook& book) {
  return _mm512_permutexvar_epi16(s ? _mm512_srli_epi16(words, 4 * s) : words, book.values);
}
inline void store_in_order(const Floats (&of_nibble)[4], float* out) {
  const Floats a = _mm512_unpacklo_ps(of_nibble[1], of_nibble[0]), b = _mm512_unpackhi_ps(of_nibble[1], of_nibble[0]);
  const Floats c = _mm512_unpacklo_ps(of_nibble[3], of_nibble[2]), d = _mm512_unpackhi_ps(of_nibble[3], of_nibble[2]);
  const auto pairs = [](Floats x, Floats y, auto high) {
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))
                                 : _mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  // Lane l's four weights lie in quarter l / 4 of v[l % 4].
  const Floats v[] = {pairs(a, c, Index<0>{}), pairs(a, c, Index<1>{}), pairs(b, d, Index<0>{}),
                      pairs(b, d, Index<1>{})};
  const Floats e = _mm512_shuffle_f32x4(v[0], v[1], 0x44), f = _mm512_shuffle_f32x4(v[0], v[1], 0xEE);
  const Floats g = _mm512_shuffle_f32x4(v[2], v[3], 0x44), h = _mm512_shuffle_f32x4(v[2], v[3], 0xEE);
  store(out, _mm512_shuffle_f32x4(e, g, 0x88));
  store(out + kLanes, _mm512_shuffle_f32x4(e, g, 0xDD));
  store(out + 2 * kLanes, _mm512_shuffle_f32x4(f, h, 0x88));
  store(out + 3 * kLanes, _mm512_shuffle_f32x4(f, h, 0xDD));
}
inline Ints load_words(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <int s>
inline Floats decode_nibble(Ints words, const FloatCodebook& book) {
  return _mm512_permutexvar_ps(s ? _mm512_srli_epi32(words, 4 * s) : words, book.values);
}
inline Ints magnitude_bits(Floats x) { return _mm512_castps_si512(_mm512_abs_ps(x)); }
inline Ints max_ints(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Floats where_less(Ints number, uint32_t limit, Floats x) {
  const __mmask16 less = _mm512_cmplt_epi32_mask(number, _mm512_set1_epi32(static_cast<int>(limit)));
  return _mm512_mask_mov_ps(splat(-__builtin_inff()), less, x);
}
inline uint32_t lanes_at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t first_lane_bits(int64_t count) { return first_lanes(count); }
inline Ints round_to_ints(Floats x, uint32_t lanes) {
  return _mm512_maskz_cvtps_epi32(static_cast<__mmask16>(lanes), x);
}
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Ints splat_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
inline void store_pairs(int32_t* p, Ints low, Ints high) {
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAAu, low, _mm512_slli_epi32(high, 16)));
}

inline void store_units(uint8_t* p, Floats x, float most) {
  // The minimum of a number and NaN is the second operand.
  const Ints units = _mm512_cvttps_epi32(_mm512_min_ps(splat(most), _mm512_abs_ps(x)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(units));
}
inline Ints add_where_in(const CodeSet& codes, Ints sums, const uint8_t* row, uint8_t units) {
  const Ints words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  // A word's low nibble goes to the low half of its low byte, the high nibble to the low half of its high byte.
  const Ints nibbles = _mm512_or_si512(words, _mm512_slli_epi16(words, 4));
  const __mmask64 in = _mm512_movepi8_mask(_mm512_permutexvar_epi8(nibbles, codes.has));
  return _mm512_mask_adds_epu8(sums, in, sums, _mm512_set1_epi8(static_cast<char>(units)));
}
inline bool all_bytes_at_least(Ints sums, int bound) {
  return _mm512_cmpge_epu8_mask(sums, _mm512_set1_epi8(static_cast<char>(bound))) == ~__mmask64{0};
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
