// The vocabulary codec:: for AVX2 + FMA + F16C. scalar/codec.h says what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/avx2/bfloat16.h"
#include "cpp/cpu/isa/dynamic8_cells.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/codes.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/stochastic.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace codec {

inline constexpr int kLanes = 16;
inline constexpr int kGroup = 2 * kLanes;

struct Floats {
  __m256 low, high;
};

inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats halves(float low, float high) { return {_mm256_set1_ps(low), _mm256_set1_ps(high)}; }

inline void accumulate(double* sums, Floats x) {
  const __m128 quarter[4] = {_mm256_castps256_ps128(x.low), _mm256_extractf128_ps(x.low, 1),
                             _mm256_castps256_ps128(x.high), _mm256_extractf128_ps(x.high, 1)};
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_pd(sums + 4 * i, _mm256_add_pd(_mm256_loadu_pd(sums + 4 * i), _mm256_cvtps_pd(quarter[i])));
  }
}

struct Pairs {
  Floats even, odd;
};
// Even and odd elements of 16, given as 0-3, 8-11 and 4-7, 12-15: shuffles stay within 128 bits.
inline __m256 evens(__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, 0x88); }
inline __m256 odds(__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, 0xDD); }
inline Pairs load_pairs(const float* p) {
  const __m256 a = _mm256_loadu2_m128(p + 8, p), b = _mm256_loadu2_m128(p + 12, p + 4);
  const __m256 c = _mm256_loadu2_m128(p + 24, p + 16), d = _mm256_loadu2_m128(p + 28, p + 20);
  return {{evens(a, b), evens(c, d)}, {odds(a, b), odds(c, d)}};
}
inline __m256i load_vector(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Pairs load_pairs(const bfloat16* p) {
  const __m256i low = load_vector(p), high = load_vector(p + 16),
                mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(low, mask)), _mm256_castsi256_ps(_mm256_and_si256(high, mask))}};
}
inline Pairs load_pairs(const float16* p) {
  // Words are brought to the order 0-3, 8-11, 4-7, 12-15 before they are widened.
  const __m256i low = _mm256_permute4x64_epi64(load_vector(p), 0xD8);
  const __m256i high = _mm256_permute4x64_epi64(load_vector(p + 16), 0xD8);
  const __m256 a = _mm256_cvtph_ps(_mm256_castsi256_si128(low)), b = _mm256_cvtph_ps(_mm256_extracti128_si256(low, 1));
  const __m256 c = _mm256_cvtph_ps(_mm256_castsi256_si128(high)),
               d = _mm256_cvtph_ps(_mm256_extracti128_si256(high, 1));
  return {{evens(a, b), evens(c, d)}, {odds(a, b), odds(c, d)}};
}

struct Codes {
  __m256i low, high;
};
// Looks up 16 dwords by the low four bits of each lane.
inline __m256i look_up(__m256 low, __m256 high, __m256i index) {
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                              _mm256_permutevar8x32_ps(high, index),
                                              _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))));
}

// Binary search in the 15 boundaries. After each step, a lane holds the negated rank as far as it is known, whose low
// three bits are the index of the next boundary to compare with.
struct Search {
  float first = 0.0f, second[8] = {}, third[8] = {}, fourth[8] = {};

  constexpr Search() = default;
  explicit constexpr Search(const CodeTable& table) : first(table.boundary[7]) {
    for (int i = 0; i < 2; ++i) second[-i & 7] = table.boundary[8 * i + 3];
    for (int i = 0; i < 4; ++i) third[-i & 7] = table.boundary[4 * i + 1];
    for (int i = 0; i < 8; ++i) fourth[-i & 7] = table.boundary[2 * i];
  }
};
inline constexpr PerCode<Search> kSearch;

// The code of a rank is the rank itself or, if kInOrder is false, is looked up.
template <bool kInOrder>
class SearchEncoder {
 public:
  static constexpr bool serves(Code code) { return table_of(code).is_ascending || !kInOrder; }
  explicit SearchEncoder(Code code)
      : SearchEncoder(table_of(code), is_custom(code) ? Search(table_of(code)) : kSearch[code]) {}
  SearchEncoder(const CodeTable& table, const Search& search)
      : first_(_mm256_set1_ps(search.first)),
        second_(_mm256_loadu_ps(search.second)),
        third_(_mm256_loadu_ps(search.third)),
        fourth_(_mm256_loadu_ps(search.fourth)),
        low_values_(_mm256_loadu_ps(table.value)),
        high_values_(_mm256_loadu_ps(table.value + 8)) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.code_of_rank));
    low_codes_ = _mm256_castsi256_ps(_mm256_cvtepu8_epi32(codes));
    high_codes_ = _mm256_castsi256_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)));
  }
  Codes encode(Floats q) const { return {encode(q.low), encode(q.high)}; }
  Codes encode_within(Floats q) const { return encode(q); }
  Floats values(Codes c) const {
    return {_mm256_castsi256_ps(look_up(low_values_, high_values_, c.low)),
            _mm256_castsi256_ps(look_up(low_values_, high_values_, c.high))};
  }

 private:
  __m256i encode(__m256 q) const {
    const auto step = [q](__m256i so_far, __m256 boundaries) {
      const __m256 boundary = _mm256_permutevar8x32_ps(boundaries, so_far);
      const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(q, boundary, _CMP_GT_OQ));
      return _mm256_add_epi32(_mm256_add_epi32(so_far, so_far), above);
    };
    __m256i rank = _mm256_castps_si256(_mm256_cmp_ps(q, first_, _CMP_GT_OQ));
    rank = step(rank, second_);
    rank = step(rank, third_);
    rank = step(rank, fourth_);
    rank = _mm256_sub_epi32(_mm256_setzero_si256(), rank);
    return kInOrder ? rank : look_up(low_codes_, high_codes_, rank);
  }

  __m256 first_, second_, third_, fourth_, low_values_, high_values_, low_codes_, high_codes_;
};
using FastEncoder = SearchEncoder<true>;
using Encoder = SearchEncoder<false>;

// 16 integers below 256, as bytes.
inline void store_bytes(uint8_t* p, __m256i low, __m256i high) {
  const __m256i words = _mm256_packus_epi32(low, high);  // 0-3, 8-11 | 4-7, 12-15
  const __m256i bytes = _mm256_packus_epi16(words, words);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
inline void store_codes(uint8_t* codes, Codes c) { store_bytes(codes, c.low, c.high); }
inline void store_packed(uint8_t* packed, Codes even, Codes odd) {
  store_bytes(packed, _mm256_or_si256(_mm256_slli_epi32(even.low, 4), odd.low),
              _mm256_or_si256(_mm256_slli_epi32(even.high, 4), odd.high));
}

class Thresholds {
 public:
  explicit Thresholds(uint64_t seed)
      : before_(_mm256_set1_epi32(static_cast<int>(seed_words(seed).before))),
        behind_(_mm256_set1_epi32(static_cast<int>(seed_words(seed).behind))) {}
  Pairs at(uint64_t first) const {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(element_word(first)));
    return {{every_other<0>(word), every_other<16>(word)}, {every_other<1>(word), every_other<17>(word)}};
  }

 private:
  // The thresholds of the elements kFirst, kFirst + 2, .. of a group. `word` is that of the group's first element.
  template <int kFirst>
  __m256 every_other(__m256i word) const {
    const __m256i element = _mm256_setr_epi32(kFirst, kFirst + 2, kFirst + 4, kFirst + 6, kFirst + 8, kFirst + 10,
                                              kFirst + 12, kFirst + 14);
    const __m256i steps = _mm256_mullo_epi32(element, _mm256_set1_epi32(static_cast<int>(kElementStep)));
    __m256i x = _mm256_xor_si256(_mm256_add_epi32(word, steps), before_);
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)),
                           _mm256_set1_epi32(static_cast<int>(0x85EBCA6Bu)));
    x = _mm256_add_epi32(x, behind_);
    x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 13)),
                           _mm256_set1_epi32(static_cast<int>(0xC2B2AE35u)));
    const __m256 number = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
    return _mm256_mul_ps(_mm256_add_ps(number, _mm256_set1_ps(0.5f)), _mm256_set1_ps(1.0f / 65536.0f));
  }

  __m256i before_, behind_;
};

// Negated ranks of 16 lanes.
struct Ranks {
  __m256i low, high;
};
class RankPacker {
 public:
  explicit RankPacker(const CodeTable& table)
      : code_of_rank_(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.code_of_rank)))) {}
  void store(uint8_t* packed, Ranks even, Ranks odd) const {
    // Elements 0-3, 8-11 | 4-7, 12-15, the even ones and then the odd ones.
    const __m256i negated =
        _mm256_packs_epi16(_mm256_packs_epi32(even.low, even.high), _mm256_packs_epi32(odd.low, odd.high));
    const __m256i codes = _mm256_shuffle_epi8(code_of_rank_, _mm256_abs_epi8(negated));
    const __m256i pairs = _mm256_shuffle_epi8(
        codes, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)));
    const __m256i words = _mm256_maddubs_epi16(pairs, _mm256_set1_epi16(0x0110));  // 16 * even + odd
    const __m256i bytes = _mm256_packus_epi16(words, words);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  }

 private:
  __m256i code_of_rank_;
};

// Three steps of binary search find the even rank 2i with ranked[2i] < q <= ranked[2i + 2], as in SearchEncoder. Then q
// is compared with the random boundaries above ranked[2i] and ranked[2i + 1]. Lookups within 128 bits and differences
// are cheaper than lookups in all eight lanes.
class StochasticEncoder : public RankPacker {
 public:
  explicit StochasticEncoder(const CodeTable& table)
      : RankPacker(table),
        first_(_mm256_set1_ps(table.ranked[8])),
        low_second_(_mm256_set1_ps(table.ranked[4])),
        high_second_(_mm256_set1_ps(table.ranked[12])) {
    float third[8] = {}, even[8] = {}, odd[8] = {}, odd_gap[8] = {};
    for (int i = 0; i < 8; ++i) {
      const int lane = -i & 7;
      third[lane] = table.ranked[4 * (i % 4) + 2];
      even[lane] = table.ranked[2 * i];
      odd[lane] = table.ranked[2 * i + 1];
      odd_gap[lane] = i < 7 ? table.gap[2 * i + 1] : __builtin_inff();
    }
    third_ = _mm256_loadu_ps(third);
    even_ = _mm256_loadu_ps(even);
    odd_ = _mm256_loadu_ps(odd);
    odd_gap_ = _mm256_loadu_ps(odd_gap);
  }
  Ranks encode(Floats q, Floats threshold) const {
    return {encode(q.low, threshold.low), encode(q.high, threshold.high)};
  }

 private:
  __m256i encode(__m256 q, __m256 threshold) const {
    const auto above = [q](__m256 value) { return _mm256_castps_si256(_mm256_cmp_ps(q, value, _CMP_GT_OQ)); };
    const auto twice = [](__m256i x) { return _mm256_add_epi32(x, x); };
    const __m256 in_high = _mm256_cmp_ps(q, first_, _CMP_GT_OQ);
    __m256i rank = _mm256_add_epi32(twice(_mm256_castps_si256(in_high)),
                                    above(_mm256_blendv_ps(low_second_, high_second_, in_high)));
    rank = _mm256_add_epi32(twice(rank), above(_mm256_permutevar_ps(third_, rank)));
    const __m256 even = _mm256_permutevar8x32_ps(even_, rank), odd = _mm256_permutevar8x32_ps(odd_, rank);
    const __m256 even_gap = _mm256_sub_ps(odd, even), odd_gap = _mm256_permutevar8x32_ps(odd_gap_, rank);
    const __m256i even_above = above(_mm256_add_ps(even, _mm256_mul_ps(threshold, even_gap)));
    const __m256i odd_above = above(_mm256_add_ps(odd, _mm256_mul_ps(threshold, odd_gap)));
    return _mm256_add_epi32(twice(rank), _mm256_add_epi32(even_above, odd_above));
  }

  __m256 first_, low_second_, high_second_, third_, even_, odd_, odd_gap_;
};

class ConsecutiveEncoder : public RankPacker {
 public:
  explicit ConsecutiveEncoder(const CodeTable& table) : RankPacker(table), least_(_mm256_set1_ps(table.ranked[0])) {}
  Ranks encode(Floats q, Floats threshold) const {
    return {encode(q.low, threshold.low), encode(q.high, threshold.high)};
  }

 private:
  __m256i encode(__m256 q, __m256 threshold) const {
    // The maximum with NaN is the second operand.
    const __m256 at_least = _mm256_max_ps(_mm256_floor_ps(q), least_);
    const __m256 below = _mm256_min_ps(at_least, _mm256_add_ps(least_, _mm256_set1_ps(kCodes - 2)));
    const __m256 above = _mm256_cmp_ps(q, _mm256_add_ps(below, threshold), _CMP_GT_OQ);
    return _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_sub_ps(least_, below)), _mm256_castps_si256(above));
  }

  __m256 least_;
};

// Codes of eight lanes, as 32-bit integers.
inline __m256i encode_dynamic8(__m256 q) {
  using Cells = Dynamic8Cells;
  const __m256i bits = _mm256_castps_si256(q), sign = _mm256_srai_epi32(bits, 31);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MAX));
  const __m256i above_least = _mm256_sub_epi32(magnitude, _mm256_set1_epi32(Cells::kLeastBits));
  const __m256i place =
      _mm256_min_epi32(_mm256_max_epi32(above_least, _mm256_setzero_si256()), _mm256_set1_epi32(Cells::kRange));
  const __m256i cell = _mm256_add_epi32(_mm256_srli_epi32(place, Cells::kLowBits),
                                        _mm256_and_si256(sign, _mm256_set1_epi32(Cells::kCells)));
  const __m256i entry = _mm256_i32gather_epi32(kDynamic8Cells.entry, cell, 4);
  const __m256i low = _mm256_xor_si256(_mm256_and_si256(place, _mm256_set1_epi32(Cells::kLowMask)), sign);
  return _mm256_srli_epi32(_mm256_add_epi32(entry, low), Cells::kLowBits);
}
inline void store_dynamic8(uint8_t* codes, Floats q) {
  store_bytes(codes, encode_dynamic8(q.low), encode_dynamic8(q.high));
}

template <class T>
class Largest {
 public:
  void see(const T* group) {
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < kGroup; i += 8) {
        bits_ = _mm256_max_epu32(bits_, _mm256_and_si256(load_vector(group + i), _mm256_set1_epi32(0x7FFFFFFF)));
      }
    } else {
      for (int i = 0; i < kGroup; i += 16) {
        bits_ = _mm256_max_epu16(bits_, _mm256_and_si256(load_vector(group + i), _mm256_set1_epi16(0x7FFF)));
      }
    }
  }
  float magnitude() const {
    const __m128i low = _mm256_castsi256_si128(bits_), high = _mm256_extracti128_si256(bits_, 1);
    if constexpr (sizeof(T) == 4) {
      __m128i x = _mm_max_epu32(low, high);
      x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4E));
      x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xB1));
      return bits_float(static_cast<uint32_t>(_mm_cvtsi128_si32(x)));
    } else {
      // There is an instruction for the least of eight words, and none for the largest.
      const __m128i least = _mm_minpos_epu16(_mm_xor_si128(_mm_max_epu16(low, high), _mm_set1_epi16(-1)));
      return to_float(T{static_cast<uint16_t>(~_mm_cvtsi128_si32(least))});
    }
  }

 private:
  __m256i bits_ = _mm256_setzero_si256();
};

// from_float of 16 lanes, as words.
inline __m256i round_to_bfloat16(Floats x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(bfloat16_bits(x.low), bfloat16_bits(x.high)), 0xD8);
}
inline __m256i round_to_float16(Floats x) {
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
}

class Values {
 public:
  explicit Values(const CodeTable& table) : values_(load(table.value)) {}
  Floats times(float scale) const { return mul(values_, splat(scale)); }

 private:
  Floats values_;
};
// Codes 0-7 and 8-15 as floats; or the low and the high bytes of 16 words, in both halves of the register.
template <class T>
struct Table {
  __m256i low, high;
};
template <class T>
inline Table<T> split_words(__m256i words) {
  // Gathers the low bytes of each half in its quarter 0 and the high bytes in its quarter 1, then quarters of a kind.
  const __m256i bytes = _mm256_shuffle_epi8(
      words, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
  return {_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xDD)};
}
template <class T>
Table<T> round_table(Floats decoded);
template <>
inline Table<float> round_table(Floats decoded) {
  return {_mm256_castps_si256(decoded.low), _mm256_castps_si256(decoded.high)};
}
template <>
inline Table<float16> round_table(Floats decoded) {
  return split_words<float16>(round_to_float16(decoded));
}
template <>
inline Table<bfloat16> round_table(Floats decoded) {
  return split_words<bfloat16>(round_to_bfloat16(decoded));
}
template <class T>
inline Table<T> make_table(const Values& values, float scale) {
  return round_table<T>(values.times(scale));
}

template <bool kStream>
inline void store_vector(void* p, __m256i x) {
  if constexpr (kStream) {
    _mm256_stream_si256(static_cast<__m256i*>(p), x);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  }
}

template <bool kStream>
inline void decode(const Table<float>& table, const uint8_t* packed, float* out) {
  for (int i = 0; i < 4; ++i) {
    uint32_t eight_codes;
    __builtin_memcpy(&eight_codes, packed + 4 * i, 4);
    const __m256i copies = _mm256_set1_epi32(static_cast<int>(eight_codes));
    const __m256i codes = _mm256_srlv_epi32(copies, _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.low), codes);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.high), codes);
    const __m256 bit3_as_sign = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    store_vector<kStream>(out + 8 * i, _mm256_castps_si256(_mm256_blendv_ps(low, high, bit3_as_sign)));
  }
}

template <bool kStream, class T>
inline void decode(const Table<T>& table, const uint8_t* packed, T* out) {
  // Four packed bytes are the eight weights of half a vector. Quarters 0, 2, 1, 3 make the unpacks below leave the
  // weights in order.
  const __m128i quarters = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), 0xD8);
  const __m256i bytes = _mm256_cvtepu8_epi16(quarters);
  const __m256i codes =
      _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(bytes, 4), _mm256_slli_epi16(bytes, 8)), _mm256_set1_epi8(15));
  const __m256i low = _mm256_shuffle_epi8(table.low, codes), high = _mm256_shuffle_epi8(table.high, codes);
  store_vector<kStream>(out, _mm256_unpacklo_epi8(low, high));
  store_vector<kStream>(out + 16, _mm256_unpackhi_epi8(low, high));
}
inline void finish_streaming() { _mm_sfence(); }
inline Pairs decode_pairs(const Table<float>& table, const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m256i low = _mm256_cvtepu8_epi32(bytes), high = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
  const auto values = [&table](__m256i codes) {  // in the low four bits
    return _mm256_castsi256_ps(look_up(_mm256_castsi256_ps(table.low), _mm256_castsi256_ps(table.high), codes));
  };
  return {{values(_mm256_srli_epi32(low, 4)), values(_mm256_srli_epi32(high, 4))}, {values(low), values(high)}};
}

inline int64_t decode_many_scales(const uint8_t*, int64_t, float, float, float*) { return 0; }
inline int64_t look_up_many_scales(const uint8_t*, int64_t, const float*, float*) { return 0; }
inline int64_t widen_many_scales(const float16* scales, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + i))));
  return i;
}

inline void multiply_eight(const uint8_t* bytes, float step, float by, float* out) {
  const __m256i integers = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(integers), _mm256_set1_ps(step));
  _mm256_storeu_ps(out, _mm256_mul_ps(product, _mm256_set1_ps(by)));
}

}  // namespace codec
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
