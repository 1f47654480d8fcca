// The vocabulary panel:: for AVX-512. scalar/panel.h says what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/avx512/bfloat16.h"
#include "cpp/cpu/isa/unit_codes.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

inline constexpr int kLanes = 16;
inline constexpr int kAccumulators = 24;  // of 32 registers: the rest hold operands
inline constexpr bool kSpareRegisters = true;

using F = __m512;
using U = __m512i;

inline F zero() { return _mm512_setzero_ps(); }
inline F splat(float x) { return _mm512_set1_ps(x); }
using Broadcast = F;
inline Broadcast broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }

// Loads `count` elements from p, and zeros after them. Nothing beyond them is touched.
inline F load_first(const float* p, int count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
inline F widen_bf16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline F load(const bfloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F load_first(const bfloat16* p, int count) { return widen_bf16(_mm256_maskz_loadu_epi16((1u << count) - 1, p)); }
inline F load(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F load_first(const float16* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
}

inline void store(bfloat16* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bfloat16(v)); }
inline void store(float16* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_first(float* p, F v, int count) { _mm512_mask_storeu_ps(p, (1u << count) - 1, v); }
inline void store_first(bfloat16* p, F v, int count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, round_to_bfloat16(v));
}
inline void store_first(float16* p, F v, int count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// Zeroes the lanes of v whose random bits are below `threshold`.
inline F keep_from(F v, const uint32_t* bits, uint32_t threshold) {
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(bits), _mm512_set1_epi32(threshold)), v);
}

// v[i][j] <-> v[j][i]
inline void transpose(F (&v)[kLanes]) {
  __m512d pair[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1]));
    pair[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
  }
  F quad[16];  // quad[4q + c], 128-bit part b: column 4b + c of rows 4q .. 4q+3
  for (int q = 0; q < 4; ++q) {
    quad[4 * q + 0] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[4 * q], pair[4 * q + 2]));
    quad[4 * q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[4 * q], pair[4 * q + 2]));
    quad[4 * q + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[4 * q + 1], pair[4 * q + 3]));
    quad[4 * q + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[4 * q + 1], pair[4 * q + 3]));
  }
  for (int c = 0; c < 4; ++c) {
    const F even01 = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x88),
            odd01 = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xDD);
    const F even23 = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x88);
    const F odd23 = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xDD);
    v[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    v[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    v[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xDD);
    v[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xDD);
  }
}

// Splits the pairs of neighbouring lanes of a and then b into their first and their second lanes.
inline void unzip(F a, F b, F& even, F& odd) {
  const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, from, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(from, _mm512_set1_epi32(1)), b);
}

// The inverse of unzip.
inline void zip(F even, F odd, F& a, F& b) {
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = _mm512_permutex2var_ps(even, from, odd);
  b = _mm512_permutex2var_ps(even, _mm512_add_epi32(from, _mm512_set1_epi32(8)), odd);
}

// Convert a group between memory order (element 4i + j) and the order in which nibbles are decoded (vector j, lane i).
inline void decoded_to_memory_order(F (&v)[4]) {
  const F lo01 = _mm512_unpacklo_ps(v[0], v[1]), hi01 = _mm512_unpackhi_ps(v[0], v[1]);
  const F lo23 = _mm512_unpacklo_ps(v[2], v[3]), hi23 = _mm512_unpackhi_ps(v[2], v[3]);
  const auto join = [](F a, F b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  const F c0 = join(lo01, lo23, false), c1 = join(lo01, lo23, true);
  const F c2 = join(hi01, hi23, false), c3 = join(hi01, hi23, true);  // c_c, part b: elements 16b + 4c ..
  const F a = _mm512_shuffle_f32x4(c0, c1, 0x44), b = _mm512_shuffle_f32x4(c2, c3, 0x44);
  const F c = _mm512_shuffle_f32x4(c0, c1, 0xEE), d = _mm512_shuffle_f32x4(c2, c3, 0xEE);
  v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, b, 0xDD);
  v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(c, d, 0xDD);
}
inline void memory_to_decoded_order(F (&v)[4]) {
  const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
  const F lo01 = _mm512_permutex2var_ps(v[0], even, v[1]), hi01 = _mm512_permutex2var_ps(v[0], odd, v[1]);
  const F lo23 = _mm512_permutex2var_ps(v[2], even, v[3]), hi23 = _mm512_permutex2var_ps(v[2], odd, v[3]);
  v[0] = _mm512_shuffle_f32x4(lo01, lo23, 0x44);
  v[1] = _mm512_shuffle_f32x4(lo01, lo23, 0xEE);
  v[2] = _mm512_shuffle_f32x4(hi01, hi23, 0x44);
  v[3] = _mm512_shuffle_f32x4(hi01, hi23, 0xEE);
}

// Four consecutive codes of a packed buffer in each lane: element 4i + j of the group is nibble j of lane i, in the
// order high, low, high, low of two bytes.
using Codes = U;
inline Codes load_codes(const uint8_t* packed) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
}
// The same, from the low nibble of *packed on if `odd`, with only `bytes` bytes readable.
inline Codes load_codes(const uint8_t* packed, bool odd, int64_t bytes) {
  const auto readable = [](int64_t n) { return n >= 32 ? 0xFFFFFFFFu : n > 0 ? (1u << n) - 1 : 0u; };
  const __m256i here = _mm256_maskz_loadu_epi8(readable(bytes), packed);
  if (!odd) return _mm512_cvtepu16_epi32(here);
  const __m256i next = _mm256_maskz_loadu_epi8(readable(bytes - 1), packed + 1), low = _mm256_set1_epi8(15);
  return _mm512_cvtepu16_epi32(_mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(here, low), 4),
                                               _mm256_and_si256(_mm256_srli_epi16(next, 4), low)));
}
template <int j>
inline U nibble(Codes c) {
  constexpr int kShift[4] = {4, 0, 12, 8};
  return kShift[j] ? _mm512_srli_epi32(c, kShift[j]) : c;
}

// The scaled values of a code, and with an offset. lookup<j> decodes code j of each lane.
struct Table {
  F value;
};
inline Table values_of(const CodeTable& table) { return {_mm512_loadu_ps(table.value)}; }
inline Table scaled(const Table& t, F scale) { return {mul(t.value, scale)}; }
inline Table add_offset(const Table& t, F offset) { return {add(t.value, offset)}; }
template <int j>
inline F lookup(const Table& t, Codes c) {
  return _mm512_permutexvar_ps(nibble<j>(c), t.value);
}

// Elements 4i + j of a group: those before element `first` from a, the others from b.
template <int j>
inline F joined(int first, F a, F b) {
  const U element = _mm512_setr_epi32(j, j + 4, j + 8, j + 12, j + 16, j + 20, j + 24, j + 28, j + 32, j + 36, j + 40,
                                      j + 44, j + 48, j + 52, j + 56, j + 60);
  return _mm512_mask_mov_ps(a, _mm512_cmpge_epi32_mask(element, _mm512_set1_epi32(first)), b);
}

// Two units. A byte of low nibbles becomes two bytes, and each byte of the result takes eight bits of its quadword,
// from a bit on that is chosen so that the upper bits come to lie above the nibble.
inline U low_of_units(const uint8_t* at, int unit_bytes) {
  const auto nibbles = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  const U words = _mm512_cvtepu8_epi16(_mm256_set_m128i(nibbles(at + unit_bytes), nibbles(at)));
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x3034202410140004), words);
}
template <>
struct UnitCodes<6> {
  static constexpr bool kServes = true;
  static U of(const uint8_t* at) {
    const auto eight = [](const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); };
    constexpr int kBytes = static_cast<int>(unit_bytes(6));
    const U lanes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(eight(at + kUnit / 2), eight(at + kBytes + kUnit / 2)));
    const U upper = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x22201E1C02003E3C), lanes);
    const U codes = _mm512_ternarylogic_epi32(low_of_units(at, kBytes), upper, _mm512_set1_epi8(15), 0xE4);
    return _mm512_and_si512(codes, _mm512_set1_epi8(63));
  }
};
template <>
struct UnitCodes<5> {
  static constexpr bool kServes = true;
  static U of(const uint8_t* at) {
    constexpr int kBytes = static_cast<int>(unit_bytes(5));
    uint32_t first, second;
    __builtin_memcpy(&first, at + kUnit / 2, 4);
    __builtin_memcpy(&second, at + kBytes + kUnit / 2, 4);
    const U all = _mm512_set1_epi64(static_cast<int64_t>(first | uint64_t{second} << 32));
    const U bits = _mm512_add_epi8(
        _mm512_set1_epi64(0x03020100FFFEFDFC),
        _mm512_setr_epi64(0, 0x0808080808080808, 0x1010101010101010, 0x1818181818181818, 0x2020202020202020,
                          0x2828282828282828, 0x3030303030303030, 0x3838383838383838));
    const U upper = _mm512_multishift_epi64_epi8(bits, all);
    const U codes = _mm512_ternarylogic_epi32(low_of_units(at, kBytes), upper, _mm512_set1_epi8(15), 0xE4);
    return _mm512_and_si512(codes, _mm512_set1_epi8(31));
  }
};

// Random bits of elements 4*group .. 4*(group + kLanes) - 1.
inline void philox(uint64_t seed, uint64_t group, uint32_t* bits) {
  const U iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const U low = _mm512_set1_epi32(static_cast<int>(group));
  U c0 = _mm512_add_epi32(low, iota), c2 = _mm512_setzero_si512(), c3 = _mm512_setzero_si512();
  const __mmask16 carry = _mm512_cmplt_epu32_mask(c0, low);
  U c1 = _mm512_set1_epi32(static_cast<int>(group >> 32));
  c1 = _mm512_mask_add_epi32(c1, carry, c1, _mm512_set1_epi32(1));
  const auto multiply = [](U c, uint32_t by, U* high) {
    const U m = _mm512_set1_epi32(static_cast<int>(by));
    const U even = _mm512_mul_epu32(c, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(c, 32), m);
    *high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  };
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U h0, h1;
    const U l0 = multiply(c0, 0xD2511F53u, &h0), l1 = multiply(c2, 0xCD9E8D57u, &h1);
    c0 = _mm512_xor_si512(_mm512_xor_si512(h1, c1), _mm512_set1_epi32(static_cast<int>(k0)));
    c2 = _mm512_xor_si512(_mm512_xor_si512(h0, c3), _mm512_set1_epi32(static_cast<int>(k1)));
    c1 = l1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  F v[4] = {_mm512_castsi512_ps(c0), _mm512_castsi512_ps(c1), _mm512_castsi512_ps(c2), _mm512_castsi512_ps(c3)};
  decoded_to_memory_order(v);
  for (int q = 0; q < 4; ++q) _mm512_storeu_ps(bits + 16 * q, v[q]);
}

// Lanes that hold two words each (many_tokens/multiply-inl.h): two words are broadcast together, and the sums of both
// lie side by side.
template <class W>
struct TwoWords : W {
  static constexpr int kWords = 2;
  static typename W::Vector broadcast(const typename W::Word* p) {
    double both;
    __builtin_memcpy(&both, p, sizeof(both));
    return (typename W::Vector)_mm512_set1_pd(both);
  }
  // The lanes of a and b alternately.
  static void interleave(F a, F b, F& low, F& high) {
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = _mm512_permutex2var_ps(a, from, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(from, _mm512_set1_epi32(8)), b);
  }
  // The sums of neighbours: those of `low` come first.
  static F add_neighbours(F low, F high) {
    F even, odd;
    unzip(low, high, even, odd);
    return add(even, odd);
  }
};

struct WordInt {
  using Word = int32_t;
  using Vector = U;
  using Sum = U;
  static Sum no_sum() { return _mm512_setzero_si512(); }
  static Vector load(const Word* p) { return _mm512_loadu_si512(p); }
  static Vector broadcast(const Word* p) { return _mm512_set1_epi32(*p); }
  static Sum multiply_add(Vector a, Vector b, Sum sum) { return _mm512_dpwssd_epi32(sum, a, b); }
  static F to_floats(Sum sum) { return _mm512_cvtepi32_ps(sum); }

  template <class T>
  static Vector round_row(const T* p, F inverse) {
    const U low = _mm512_cvtps_epi32(mul(panel::load(p), inverse));
    const U high = _mm512_cvtps_epi32(mul(panel::load(p + kLanes), inverse));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(low, high));
  }
  template <class T>
  static F round_pairs(const T* p, F inverse) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(round_row(p, inverse), _mm512_broadcast_i32x4(order)));
  }
  static void store(Word* p, Vector v) { _mm512_storeu_si512(p, v); }
  static void store_bits(Word* p, F bits) { _mm512_storeu_si512(p, _mm512_castps_si512(bits)); }

  using Values = U;  // twice, so that bit 4 of an index does not matter
  static Values values_of(const int16_t* value) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value)));
  }
  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    unroll<2>([&](auto half) {
      const U bytes = _mm512_cvtepu8_epi16(twice(packed + half.value * 16));
      const U codes = _mm512_srlv_epi16(bytes, first_half(_mm256_set1_epi16(4)));
      _mm512_storeu_si512(out + half.value * kLanes, _mm512_permutexvar_epi16(codes, values));
    });
  }
  static constexpr int step_of(int word) { return word / 16 * 16 + word % 2 * 8 + word % 16 / 2; }

  static void decode_lanes(const Values& values, const uint8_t* packed, const uint8_t* next, bool halves, Word* out,
                           int64_t tile_stride) {
    const auto look_up = [&](U codes, Word* to) { store(to, _mm512_permutexvar_epi16(codes, values)); };
    const auto join = [](U row, U next_row) { return _mm512_or_si512(row, _mm512_slli_epi32(next_row, 16)); };
    if (halves) {
      unroll<2>([&](auto half) {
        const U codes = join(_mm512_cvtepu16_epi32(twice(packed + half.value * 16)),
                             _mm512_cvtepu16_epi32(twice(next + half.value * 16)));
        Word* const to = out + half.value * tile_stride;
        look_up(_mm512_srlv_epi16(codes, first_half(_mm256_set1_epi16(4))), to);
        look_up(_mm512_srlv_epi16(_mm512_srli_epi16(codes, 8), first_half(_mm256_set1_epi16(4))), to + kLanes);
      });
      return;
    }
    const U codes = join(load_codes(packed), load_codes(next));
    look_up(_mm512_srli_epi16(codes, 4), out);
    look_up(codes, out + kLanes);
    look_up(_mm512_srli_epi16(codes, 12), out + tile_stride);
    look_up(_mm512_srli_epi16(codes, 8), out + tile_stride + kLanes);
  }
  static Vector multiply_fractions(Vector v, Vector by) { return _mm512_mulhrs_epi16(v, by); }

 private:
  static __m256i twice(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // `counts` in the first half and zeros in the second.
  static U first_half(__m256i counts) { return _mm512_inserti64x4(_mm512_setzero_si512(), counts, 0); }
};

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
