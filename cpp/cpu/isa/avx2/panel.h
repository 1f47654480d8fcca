// The vocabulary panel:: for AVX2 + FMA + F16C. scalar/panel.h says what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/avx2/bfloat16.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

inline constexpr int kLanes = 8;
inline constexpr int kAccumulators = 12;  // of 16 registers: the rest hold operands
inline constexpr bool kSpareRegisters = false;

using F = __m256;
using U = __m256i;

inline F zero() { return _mm256_setzero_ps(); }
inline F splat(float x) { return _mm256_set1_ps(x); }
// With splat(*p), GCC emits a quarter more instructions for a tile of outputs.
using Broadcast = F;
inline Broadcast broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }

inline U iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline U first_lanes(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), iota()); }

inline F widen(const bfloat16*, __m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F widen(const float16*, __m128i bits) { return _mm256_cvtph_ps(bits); }

inline __m128i narrow(const bfloat16*, F v) { return round_to_bfloat16(v); }
inline __m128i narrow(const float16*, F v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

template <class T>
inline F load(const T* p) {
  return widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
inline void store(T* p, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, v));
}

// Loads `count` elements, and zeros after them. Nothing beyond them is touched.
inline F load_first(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
inline void store_first(float* p, F v, int count) { _mm256_maskstore_ps(p, first_lanes(count), v); }
template <class T>
inline F load_first(const T* p, int count) {
  T some[kLanes] = {};
  __builtin_memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  return load(some);
}
template <class T>
inline void store_first(T* p, F v, int count) {
  T all[kLanes];
  store(all, v);
  __builtin_memcpy(p, all, static_cast<size_t>(count) * sizeof(T));
}

// Zeroes the lanes of v whose random bits are below `threshold`.
inline F keep_from(F v, const uint32_t* bits, uint32_t threshold) {
  const U b = _mm256_loadu_si256(reinterpret_cast<const U*>(bits)), t = _mm256_set1_epi32(static_cast<int>(threshold));
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(b, t), b)));
}

// v[i][j] <-> v[j][i]
inline void transpose(F (&v)[kLanes]) {
  F quad[8];  // quad[4q + c], 128-bit part b: column 4b + c of rows 4q .. 4q+3
  for (int q = 0; q < 2; ++q) {
    const F lo01 = _mm256_unpacklo_ps(v[4 * q], v[4 * q + 1]), hi01 = _mm256_unpackhi_ps(v[4 * q], v[4 * q + 1]);
    const F lo23 = _mm256_unpacklo_ps(v[4 * q + 2], v[4 * q + 3]),
            hi23 = _mm256_unpackhi_ps(v[4 * q + 2], v[4 * q + 3]);
    quad[4 * q + 0] = _mm256_shuffle_ps(lo01, lo23, 0x44);
    quad[4 * q + 1] = _mm256_shuffle_ps(lo01, lo23, 0xEE);
    quad[4 * q + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
    quad[4 * q + 3] = _mm256_shuffle_ps(hi01, hi23, 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x20);
    v[4 + c] = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x31);
  }
}

// Convert a group between memory order (element 4i + j) and the order in which nibbles are decoded (vector j, lane i).
inline void decoded_to_memory_order(F (&v)[4]) {
  const F lo01 = _mm256_unpacklo_ps(v[0], v[1]), hi01 = _mm256_unpackhi_ps(v[0], v[1]);
  const F lo23 = _mm256_unpacklo_ps(v[2], v[3]), hi23 = _mm256_unpackhi_ps(v[2], v[3]);
  const F c0 = _mm256_shuffle_ps(lo01, lo23, 0x44), c1 = _mm256_shuffle_ps(lo01, lo23, 0xEE);
  const F c2 = _mm256_shuffle_ps(hi01, hi23, 0x44), c3 = _mm256_shuffle_ps(hi01, hi23, 0xEE);
  v[0] = _mm256_permute2f128_ps(c0, c1, 0x20);
  v[1] = _mm256_permute2f128_ps(c2, c3, 0x20);
  v[2] = _mm256_permute2f128_ps(c0, c1, 0x31);
  v[3] = _mm256_permute2f128_ps(c2, c3, 0x31);
}
inline void memory_to_decoded_order(F (&v)[4]) {
  const F c0 = _mm256_permute2f128_ps(v[0], v[2], 0x20), c1 = _mm256_permute2f128_ps(v[0], v[2], 0x31);
  const F c2 = _mm256_permute2f128_ps(v[1], v[3], 0x20), c3 = _mm256_permute2f128_ps(v[1], v[3], 0x31);
  const F lo01 = _mm256_unpacklo_ps(c0, c1), hi01 = _mm256_unpackhi_ps(c0, c1);
  const F lo23 = _mm256_unpacklo_ps(c2, c3), hi23 = _mm256_unpackhi_ps(c2, c3);
  v[0] = _mm256_shuffle_ps(lo01, lo23, 0x44);
  v[1] = _mm256_shuffle_ps(lo01, lo23, 0xEE);
  v[2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
  v[3] = _mm256_shuffle_ps(hi01, hi23, 0xEE);
}

// Four consecutive codes of a packed buffer in each lane: element 4i + j of the group is nibble j of lane i, in the
// order high, low, high, low of two bytes.
using Codes = U;
inline Codes load_codes(const uint8_t* packed) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}
// The same, from the low nibble of *packed on if `odd`, with only `bytes` bytes readable.
inline Codes load_codes(const uint8_t* packed, bool odd, int64_t bytes) {
  uint8_t some[32] = {};
  if (bytes >= 17) {
    __builtin_memcpy(some, packed, 17);
  } else {
    __builtin_memcpy(some, packed, static_cast<size_t>(bytes));
  }
  const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(some));
  if (!odd) return _mm256_cvtepu16_epi32(here);
  const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(some + 1)), low = _mm_set1_epi8(15);
  return _mm256_cvtepu16_epi32(
      _mm_or_si128(_mm_slli_epi16(_mm_and_si128(here, low), 4), _mm_and_si128(_mm_srli_epi16(next, 4), low)));
}

// The scaled values of a code, and with an offset. lookup<j> decodes code j of each lane.
struct Table {
  F low, high;  // codes 0..7 and 8..15
};
inline Table values_of(const CodeTable& table) {
  return {_mm256_loadu_ps(table.value), _mm256_loadu_ps(table.value + 8)};
}
inline Table scaled(const Table& t, F scale) { return {mul(t.low, scale), mul(t.high, scale)}; }
inline Table add_offset(const Table& t, F offset) { return {add(t.low, offset), add(t.high, offset)}; }
template <int j>
inline F lookup(const Table& t, Codes c) {
  constexpr int kShift[4] = {4, 0, 12, 8};
  const U code = _mm256_srli_epi32(c, kShift[j]), sign = _mm256_slli_epi32(c, 28 - kShift[j]);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, code), _mm256_permutevar8x32_ps(t.high, code),
                          _mm256_castsi256_ps(sign));
}

// Elements 4i + j of a group: those before element `first` from a, the others from b.
template <int j>
inline F joined(int first, F a, F b) {
  const U element = _mm256_add_epi32(_mm256_slli_epi32(iota(), 2), _mm256_set1_epi32(j));
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), element)));
}

// Random bits of elements 4*group .. 4*(group + kLanes) - 1.
inline void philox(uint64_t seed, uint64_t group, uint32_t* bits) {
  const uint64_t last_without_carry = 0xFFFFFFFFu - (group & 0xFFFFFFFFu);
  const U low = _mm256_set1_epi32(static_cast<int>(group));
  const U carry =
      _mm256_cmpgt_epi32(iota(), _mm256_set1_epi32(static_cast<int>(last_without_carry < 8 ? last_without_carry : 8)));
  U c0 = _mm256_add_epi32(low, iota()), c2 = _mm256_setzero_si256(), c3 = _mm256_setzero_si256();
  U c1 = _mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(group >> 32)), carry);
  const auto multiply = [](U c, uint32_t by, U* high) {
    const U m = _mm256_set1_epi32(static_cast<int>(by));
    const U even = _mm256_mul_epu32(c, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(c, 32), m);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  };
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    U h0, h1;
    const U l0 = multiply(c0, 0xD2511F53u, &h0), l1 = multiply(c2, 0xCD9E8D57u, &h1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(h1, c1), _mm256_set1_epi32(static_cast<int>(k0)));
    c2 = _mm256_xor_si256(_mm256_xor_si256(h0, c3), _mm256_set1_epi32(static_cast<int>(k1)));
    c1 = l1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  F v[4] = {_mm256_castsi256_ps(c0), _mm256_castsi256_ps(c1), _mm256_castsi256_ps(c2), _mm256_castsi256_ps(c3)};
  decoded_to_memory_order(v);
  for (int q = 0; q < 4; ++q) _mm256_storeu_ps(reinterpret_cast<float*>(bits) + 8 * q, v[q]);
}

template <class W>
using TwoWords = W;

struct WordInt {
  using Word = int32_t;
  using Vector = U;
  using Sum = U;
  static Sum no_sum() { return _mm256_setzero_si256(); }
  static Vector load(const Word* p) { return _mm256_loadu_si256(reinterpret_cast<const U*>(p)); }
  static Vector broadcast(const Word* p) { return _mm256_set1_epi32(*p); }
  // As intrinsics, GCC keeps most sums of a tile in memory.
  static Sum multiply_add(Vector a, Vector b, Sum sum) {
#ifdef __AVXVNNI__
    __asm__("%{vex%} vpdpwssd %1, %2, %0" : "+x"(sum) : "x"(b), "x"(a));
#else
    Vector products;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=x"(products) : "x"(b), "x"(a));
#endif
    return sum;
  }
  static F to_floats(Sum sum) { return _mm256_cvtepi32_ps(sum); }

  template <class T>
  static Vector round_row(const T* p, F inverse) {
    const U low = _mm256_cvtps_epi32(mul(panel::load(p), inverse));
    const U high = _mm256_cvtps_epi32(mul(panel::load(p + kLanes), inverse));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
  }
  template <class T>
  static F round_pairs(const T* p, F inverse) {
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(round_row(p, inverse), _mm256_broadcastsi128_si256(order)));
  }
  static void store(Word* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<U*>(p), v); }
  static void store_bits(Word* p, F bits) { _mm256_storeu_si256(reinterpret_cast<U*>(p), _mm256_castps_si256(bits)); }

  // The low and the high bytes of the values, in both halves: vpshufb looks up bytes.
  struct Values {
    U low, high;
  };
  static Values values_of(const int16_t* value) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const U halves =
        _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const U*>(value)), _mm256_broadcastsi128_si256(order));
    return {_mm256_permute4x64_epi64(halves, 0x88), _mm256_permute4x64_epi64(halves, 0xDD)};
  }
  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    // 0xD8: unpacking then joins the halves of 32 weights
    const U bytes = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const U*>(packed)), 0xD8);
    const U mask = _mm256_set1_epi8(15);
    const auto look_up = [&](U codes, Word* to) {
      const U low = _mm256_shuffle_epi8(values.low, codes), high = _mm256_shuffle_epi8(values.high, codes);
      _mm256_storeu_si256(reinterpret_cast<U*>(to), _mm256_unpacklo_epi8(low, high));
      _mm256_storeu_si256(reinterpret_cast<U*>(to + 2 * kLanes), _mm256_unpackhi_epi8(low, high));
    };
    look_up(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), out);
    look_up(_mm256_and_si256(bytes, mask), out + kLanes);
  }
  static constexpr int step_of(int word) { return word / 16 * 16 + word % 2 * 8 + word % 16 / 2; }

  // A group of lanes has 32 columns, so the order with `halves` is the same.
  static void decode_lanes(const Values& values, const uint8_t* packed, const uint8_t* next, bool /*halves*/, Word* out,
                           int64_t tile_stride) {
    U row[4], next_row[4];
    decode_columns(values, packed, row);
    decode_columns(values, next, next_row);
    unroll<4>([&](auto j) {
      const U low = _mm256_unpacklo_epi16(row[j.value], next_row[j.value]);
      const U high = _mm256_unpackhi_epi16(row[j.value], next_row[j.value]);
      Word* const to = out + j.value / 2 * tile_stride + j.value % 2 * kLanes;
      store(to, _mm256_permute2x128_si256(low, high, 0x20));
      store(to + 2 * tile_stride, _mm256_permute2x128_si256(low, high, 0x31));
    });
  }
  static Vector multiply_fractions(Vector v, Vector by) { return _mm256_mulhrs_epi16(v, by); }

 private:
  // Decodes 64 weights: vector j has elements 4i + j, those of the first and of the second group in its halves.
  static void decode_columns(const Values& values, const uint8_t* packed, U (&out)[4]) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const U codes =
        _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const U*>(packed)), _mm256_broadcastsi128_si256(order));
    const U mask = _mm256_set1_epi8(15);
    const auto look_up = [&](U code, U& first, U& second) {
      const U low = _mm256_shuffle_epi8(values.low, code), high = _mm256_shuffle_epi8(values.high, code);
      first = _mm256_unpacklo_epi8(low, high), second = _mm256_unpackhi_epi8(low, high);
    };
    look_up(_mm256_and_si256(_mm256_srli_epi16(codes, 4), mask), out[0], out[2]);
    look_up(_mm256_and_si256(codes, mask), out[1], out[3]);
  }
};

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
