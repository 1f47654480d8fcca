// The vocabulary codec:: for AVX-512 (F, BW, VL, DQ, VBMI; BF16 where the set has it). scalar/codec.h says what each
// name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/avx512/bfloat16.h"
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
  __m512 v;
};

inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats halves(float low, float high) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(low), 0xFF00, _mm512_set1_ps(high))};
}

inline void accumulate(double* sums, Floats x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

struct Pairs {
  Floats even, odd;
};
inline Pairs unzip(__m512 low, __m512 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(low, even, high)}, {_mm512_permutex2var_ps(low, odd, high)}};
}
inline Pairs load_pairs(const float* p) { return unzip(_mm512_loadu_ps(p), _mm512_loadu_ps(p + kLanes)); }
inline Pairs load_pairs(const float16* p) {
  return unzip(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
               _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kLanes))));
}
inline Pairs load_pairs(const bfloat16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))}};
}

// The code is in the top four bits of a lane.
struct Codes {
  __m512i v;
};
inline Floats look_up(Codes c, __m512 values) { return {_mm512_permutexvar_ps(_mm512_srli_epi32(c.v, 28), values)}; }

// Codes by table instead of by comparison. q is also read as the integer i = q * 2^28, which is exact for |q| >= 2^-5,
// where all decision boundaries lie. [-1, 1] is cut into 31 cells of 1/15, so narrow that a cell holds at most one
// boundary b. A cell whose lower end has code c maps to (c + 1) * 2^28 - b - 1: adding i leaves c + (i > b) in the top
// four bits.
inline constexpr float kFixedOne = 268435456.0f;  // 2^28
inline constexpr float kCellsPerOne = 15.0f;
inline constexpr float kCellRounder = 8388608.0f + 16.0f;  // adding it leaves round(x) + 16 in the low bits
struct Cells {
  int32_t entry[32] = {};
  // Whether codes are found this way: they ascend with the values, the largest of which is 1; no cell holds two
  // boundaries, and none is so near an edge that rounding could move it across, or so near 0 that i is not exact.
  bool serve = false;

  constexpr Cells() = default;
  explicit constexpr Cells(const CodeTable& table) : serve(table.is_ascending && table.largest == 1.0f) {
    for (int cell = 0; cell < 32 && serve; ++cell) {
      const double low = (cell - 16.5) / kCellsPerOne, high = (cell - 15.5) / kCellsPerOne;
      int64_t code = 0;
      while (code < kCodes - 1 && table.boundary[code] < low) ++code;
      // A cell without a boundary takes one from well above it.
      double boundary = high + 0.25;
      if (code < kCodes - 1 && table.boundary[code] < high) {
        boundary = table.boundary[code];
        serve &= boundary - low > 1e-4 && high - boundary > 1e-4 && (boundary >= 0x1p-5 || boundary <= -0x1p-5);
        serve &= code + 1 == kCodes - 1 || table.boundary[code + 1] > high;
      }
      const int64_t value = ((code + 1) << 28) - static_cast<int64_t>(boundary * kFixedOne) - 1;
      entry[cell] = static_cast<int32_t>(static_cast<uint32_t>(value));
    }
  }
};
inline constexpr PerCode<Cells> kCells;
static_assert(kCells[Code::kNf4].serve);

// For tables that cells serve.
class FastEncoder {
 public:
  static constexpr bool serves(Code code) { return !is_custom(code) && kCells[code].serve; }
  explicit FastEncoder(Code code)
      : low_(_mm512_loadu_si512(kCells[code].entry)),
        high_(_mm512_loadu_si512(kCells[code].entry + kLanes)),
        values_(_mm512_loadu_ps(table_of(code).value)) {}
  Codes encode_within(Floats q) const {
    const __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(q.v, _mm512_set1_ps(kFixedOne)));
    const __m512 cell = _mm512_fmadd_ps(q.v, _mm512_set1_ps(kCellsPerOne), _mm512_set1_ps(kCellRounder));
    return {_mm512_add_epi32(fixed, _mm512_permutex2var_epi32(low_, _mm512_castps_si512(cell), high_))};
  }
  Codes encode(Floats q) const {
    // The maximum of NaN and -1 is its second operand: -1, whose code is also NaN's.
    return encode_within({_mm512_min_ps(_mm512_max_ps(q.v, _mm512_set1_ps(-1.0f)), _mm512_set1_ps(1.0f))});
  }
  Floats values(Codes c) const { return look_up(c, values_); }

 private:
  __m512i low_, high_;
  __m512 values_;
};

// For all tables: binary search for the rank, whose code is looked up.
class Encoder {
 public:
  explicit Encoder(Code code) : Encoder(table_of(code)) {}
  explicit Encoder(const CodeTable& table)
      : boundaries_(_mm512_maskz_loadu_ps(0x7FFF, table.boundary)),
        code_of_rank_(_mm512_slli_epi32(
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.code_of_rank))), 28)),
        values_(_mm512_loadu_ps(table.value)) {}
  Codes encode(Floats q) const {
    __m512i rank = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
      const __m512i next = _mm512_add_epi32(rank, _mm512_set1_epi32(step));
      const __m512 boundary = _mm512_permutexvar_ps(_mm512_add_epi32(rank, _mm512_set1_epi32(step - 1)), boundaries_);
      rank = _mm512_mask_mov_epi32(rank, _mm512_cmp_ps_mask(q.v, boundary, _CMP_GT_OQ), next);
    }
    return {_mm512_permutexvar_epi32(rank, code_of_rank_)};
  }
  Codes encode_within(Floats q) const { return encode(q); }
  Floats values(Codes c) const { return look_up(c, values_); }

 private:
  __m512 boundaries_;
  __m512i code_of_rank_;
  __m512 values_;
};

inline void store_codes(uint8_t* codes, Codes c) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(_mm512_srli_epi32(c.v, 28)));
}
inline void store_packed(uint8_t* packed, Codes even, Codes odd) {
  constexpr int kSelect = 0xCA;  // first ? second : third, bit by bit
  const __m512i top_four = _mm512_set1_epi32(static_cast<int>(0xF0000000u));
  const __m512i byte_on_top = _mm512_ternarylogic_epi32(top_four, even.v, _mm512_srli_epi32(odd.v, 4), kSelect);
  const __m512i top_bytes = _mm512_set_epi64(0, 0, 0, 0, 0, 0, 0x3F3B37332F2B2723, 0x1F1B17130F0B0703);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed),
                   _mm512_castsi512_si128(_mm512_permutexvar_epi8(top_bytes, byte_on_top)));
}

class Thresholds {
 public:
  explicit Thresholds(uint64_t seed)
      : before_(_mm512_set1_epi32(static_cast<int>(seed_words(seed).before))),
        behind_(_mm512_set1_epi32(static_cast<int>(seed_words(seed).behind))) {}
  Pairs at(uint64_t first) const {
    const __m512i word = _mm512_set1_epi32(static_cast<int>(element_word(first)));
    return {{every_other<0>(word)}, {every_other<1>(word)}};
  }

 private:
  // The thresholds of the elements kFirst, kFirst + 2, .. of a group. `word` is that of the group's first element.
  template <int kFirst>
  __m512 every_other(__m512i word) const {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i element = _mm512_add_epi32(even, _mm512_set1_epi32(kFirst));
    const __m512i steps = _mm512_mullo_epi32(element, _mm512_set1_epi32(static_cast<int>(kElementStep)));
    __m512i x = _mm512_xor_si512(_mm512_add_epi32(word, steps), before_);
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)),
                           _mm512_set1_epi32(static_cast<int>(0x85EBCA6Bu)));
    x = _mm512_add_epi32(x, behind_);
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 13)),
                           _mm512_set1_epi32(static_cast<int>(0xC2B2AE35u)));
    const __m512 number = _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 16));
    return _mm512_mul_ps(_mm512_add_ps(number, _mm512_set1_ps(0.5f)), _mm512_set1_ps(1.0f / 65536.0f));
  }

  __m512i before_, behind_;
};

struct Ranks {
  __m512i v;
};
class RankPacker {
 public:
  explicit RankPacker(const CodeTable& table)
      : code_of_rank_(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.code_of_rank))) {}
  void store(uint8_t* packed, Ranks even, Ranks odd) const {
    const auto codes = [this](Ranks ranks) { return _mm_shuffle_epi8(code_of_rank_, _mm512_cvtepi32_epi8(ranks.v)); };
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_or_si128(_mm_slli_epi16(codes(even), 4), codes(odd)));
  }

 private:
  __m128i code_of_rank_;
};

// Binary search finds the last value below q. Then q is compared with the random boundary above that.
class StochasticEncoder : public RankPacker {
 public:
  explicit StochasticEncoder(const CodeTable& table)
      : RankPacker(table),
        values_(_mm512_loadu_ps(table.ranked)),
        gaps_(_mm512_mask_loadu_ps(_mm512_set1_ps(__builtin_inff()), 0x7FFF, table.gap)) {}
  Ranks encode(Floats q, Floats threshold) const {
    __m512i rank = _mm512_setzero_si512();
    for (int step = 8; step; step /= 2) {
      const __m512i next = _mm512_add_epi32(rank, _mm512_set1_epi32(step));
      const __m512 value = _mm512_permutexvar_ps(next, values_);
      rank = _mm512_mask_mov_epi32(rank, _mm512_cmp_ps_mask(q.v, value, _CMP_GT_OQ), next);
    }
    const __m512 boundary = _mm512_add_ps(_mm512_permutexvar_ps(rank, values_),
                                          _mm512_mul_ps(threshold.v, _mm512_permutexvar_ps(rank, gaps_)));
    const __mmask16 above = _mm512_cmp_ps_mask(q.v, boundary, _CMP_GT_OQ);
    return {_mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1))};
  }

 private:
  __m512 values_, gaps_;
};

class ConsecutiveEncoder : public RankPacker {
 public:
  explicit ConsecutiveEncoder(const CodeTable& table) : RankPacker(table), least_(_mm512_set1_ps(table.ranked[0])) {}
  Ranks encode(Floats q, Floats threshold) const {
    // The maximum with NaN is the second operand.
    const __m512 at_least = _mm512_max_ps(_mm512_floor_ps(q.v), least_);
    const __m512 below = _mm512_min_ps(at_least, _mm512_add_ps(least_, _mm512_set1_ps(kCodes - 2)));
    const __mmask16 above = _mm512_cmp_ps_mask(q.v, _mm512_add_ps(below, threshold.v), _CMP_GT_OQ);
    const __m512i rank = _mm512_cvtps_epi32(_mm512_sub_ps(below, least_));
    return {_mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(1))};
  }

 private:
  __m512 least_;
};

inline void store_dynamic8(uint8_t* codes, Floats q) {
  using Cells = Dynamic8Cells;
  const __m512i bits = _mm512_castps_si512(q.v), sign = _mm512_srai_epi32(bits, 31);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MAX));
  const __m512i above_least = _mm512_sub_epi32(magnitude, _mm512_set1_epi32(Cells::kLeastBits));
  const __m512i place =
      _mm512_min_epi32(_mm512_max_epi32(above_least, _mm512_setzero_si512()), _mm512_set1_epi32(Cells::kRange));
  const __m512i cell = _mm512_add_epi32(_mm512_srli_epi32(place, Cells::kLowBits),
                                        _mm512_and_si512(sign, _mm512_set1_epi32(Cells::kCells)));
  const __m512i entry = _mm512_i32gather_epi32(cell, kDynamic8Cells.entry, 4);
  const __m512i low = _mm512_xor_si512(_mm512_and_si512(place, _mm512_set1_epi32(Cells::kLowMask)), sign);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes),
                   _mm512_cvtepi32_epi8(_mm512_srli_epi32(_mm512_add_epi32(entry, low), Cells::kLowBits)));
}

// Byte p of each of 256 values, in the order of their codes.
struct BytePlanes {
  alignas(64) uint8_t byte[4][256];
};
constexpr BytePlanes dynamic8_planes() {
  BytePlanes planes = {};
  for (int code = 0; code < 256; ++code) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, kDynamic8.value[code]);
    for (int p = 0; p < 4; ++p) planes.byte[p][code] = static_cast<uint8_t>(bits >> (8 * p));
  }
  return planes;
}
inline constexpr BytePlanes kDynamic8Planes = dynamic8_planes();

// Decodes up to 64 scales at a time: out[i] = scale_of(values of 16 codes). The four bytes of each value are looked up
// separately, in tables that vpermi2b holds in registers, because a gather costs a cycle per code.
template <class ScaleOf>
class ScaleDecoder {
 public:
  static constexpr int kCodes = 64;
  static constexpr int kWorthwhile = 16;  // fewer are faster one by one
  ScaleDecoder(const BytePlanes& planes, const ScaleOf& scale_of) : planes_(planes), scale_of_(scale_of) {}

  // Returns how many of the scales it has decoded: all but a few.
  int64_t decode(const uint8_t* codes, int64_t count, float* out) const {
    int64_t i = 0;
    for (; count - i >= kWorthwhile; i += kCodes) decode_some(codes + i, count - i, out + i);
    return i;
  }

 private:
  void decode_some(const uint8_t* codes, int64_t count, float* out) const {
    // Zipping bytes to words and words to dwords leaves part L of vector j with codes 16L + 4j .. + 3 of its operand.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i code = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(first_bits(count), codes));
    const __mmask64 upper = _mm512_movepi8_mask(code);
    __m512i byte[4];
    for (int p = 0; p < 4; ++p) {
      const auto part = [&](int quarter) { return _mm512_load_si512(planes_.byte[p] + 64 * quarter); };
      byte[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part(0), code, part(1)),
                                       _mm512_permutex2var_epi8(part(2), code, part(3)));
    }
    const __m512i low0 = _mm512_unpacklo_epi8(byte[0], byte[1]), low1 = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const __m512i high0 = _mm512_unpacklo_epi8(byte[2], byte[3]), high1 = _mm512_unpackhi_epi8(byte[2], byte[3]);
    store_scales(_mm512_unpacklo_epi16(low0, high0), out, count);
    store_scales(_mm512_unpackhi_epi16(low0, high0), out + 16, count - 16);
    store_scales(_mm512_unpacklo_epi16(low1, high1), out + 32, count - 32);
    store_scales(_mm512_unpackhi_epi16(low1, high1), out + 48, count - 48);
  }

  static uint64_t first_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }
  void store_scales(__m512i value, float* out, int64_t count) const {
    if (count <= 0) return;
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>(first_bits(count)), scale_of_(_mm512_castsi512_ps(value)));
  }

  const BytePlanes& planes_;
  const ScaleOf scale_of_;
};

inline int64_t decode_many_scales(const uint8_t* codes, int64_t count, float nested_absmax, float nested_offset,
                                  float* out) {
  const __m512 factor = _mm512_set1_ps(nested_absmax), offset = _mm512_set1_ps(nested_offset);
  const ScaleDecoder decoder(kDynamic8Planes,
                             [=](__m512 value) { return _mm512_add_ps(_mm512_mul_ps(value, factor), offset); });
  return decoder.decode(codes, count, out);
}

inline int64_t look_up_many_scales(const uint8_t* codes, int64_t count, const float* table, float* out) {
  constexpr int64_t kWorthwhile = 256;  // since the planes have to be made first
  if (count < kWorthwhile) return 0;
  BytePlanes planes;
  for (int i = 0; i < 256; i += 16) {
    const __m512i bits = _mm512_loadu_si512(table + i);
    for (int p = 0; p < 4; ++p)
      _mm_store_si128(reinterpret_cast<__m128i*>(planes.byte[p] + i),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8 * p)));
  }
  const ScaleDecoder decoder(planes, [](__m512 value) { return value; });
  return decoder.decode(codes, count, out);
}

inline int64_t widen_many_scales(const float16* scales, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 these = count - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count - i)) - 1);
    _mm512_mask_storeu_ps(out + i, these, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(these, scales + i)));
  }
  return count;
}

inline void multiply_eight(const uint8_t* bytes, float step, float by, float* out) {
  const __m256i integers = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(integers), _mm256_set1_ps(step));
  _mm256_storeu_ps(out, _mm256_mul_ps(product, _mm256_set1_ps(by)));
}

template <class T>
class Largest {
 public:
  void see(const T* group) {
    if constexpr (sizeof(T) == 4) {
      const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
      bits_ = _mm512_max_epu32(bits_, _mm512_and_si512(_mm512_loadu_si512(group), magnitude));
      bits_ = _mm512_max_epu32(bits_, _mm512_and_si512(_mm512_loadu_si512(group + kLanes), magnitude));
    } else {
      const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
      bits_ = _mm512_max_epu16(bits_, _mm512_and_si512(_mm512_loadu_si512(group), magnitude));
    }
  }
  float magnitude() const {
    if constexpr (sizeof(T) == 4) {
      return bits_float(_mm512_reduce_max_epu32(bits_));
    } else {
      const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(bits_), _mm512_extracti64x4_epi64(bits_, 1));
      const __m128i words = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      // There is an instruction for the least of eight words, and none for the largest.
      const __m128i least = _mm_minpos_epu16(_mm_xor_si128(words, _mm_set1_epi16(-1)));
      return to_float(T{static_cast<uint16_t>(~_mm_cvtsi128_si32(least))});
    }
  }

 private:
  __m512i bits_ = _mm512_setzero_si512();
};

class Values {
 public:
  explicit Values(const CodeTable& table)
      : values_(_mm512_loadu_ps(table.value)), least_normal_(0x1.000002p-126f / table.smallest) {}
  Floats times(float scale) const { return {_mm512_mul_ps(values_, _mm512_set1_ps(scale))}; }
  // Whether no product is subnormal.
  bool are_normal(float scale) const { return scale >= least_normal_; }

 private:
  __m512 values_;
  float least_normal_;
};
// 16-bit values are stored twice, so that bit 4 of an index does not matter.
template <class T>
struct Table {
  __m512i v;
};

template <class T>
Table<T> round_table(Floats decoded);
template <>
inline Table<float> round_table(Floats decoded) {
  return {_mm512_castps_si512(decoded.v)};
}
template <>
inline Table<float16> round_table(Floats decoded) {
  return {_mm512_broadcast_i64x4(_mm512_cvtps_ph(decoded.v, _MM_FROUND_TO_NEAREST_INT))};
}
template <>
inline Table<bfloat16> round_table(Floats decoded) {
  return {_mm512_broadcast_i64x4(round_to_bfloat16(decoded.v))};
}
template <class T>
inline Table<T> make_table(const Values& values, float scale) {
  return round_table<T>(values.times(scale));
}
#ifdef __AVX512BF16__
template <>
inline Table<bfloat16> make_table(const Values& values, float scale) {
  const Floats decoded = values.times(scale);
  if (!values.are_normal(scale)) return round_table<bfloat16>(decoded);  // the instruction flushes subnormals
  return {_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(decoded.v)))};
}
#endif

// The byte of a group that holds each weight, for every byte of the vectors of T to which the group decodes.
template <class T>
struct Spread {
  alignas(64) uint8_t byte[sizeof(T) / 2][64] = {};

  constexpr Spread() {
    for (unsigned i = 0; i < 32 * sizeof(T); ++i) byte[i / 64][i % 64] = static_cast<uint8_t>(i / sizeof(T) / 2);
  }
};
template <class T>
inline constexpr Spread<T> kSpread{};

template <bool kStream>
inline void store_vector(void* p, __m512i x) {
  if constexpr (kStream) {
    _mm512_stream_si512(static_cast<__m512i*>(p), x);
  } else {
    _mm512_storeu_si512(p, x);
  }
}

// Each weight's lane gets a copy of its byte, shifted right by 4 or 0. The permutes ignore the bits above the code.
template <bool kStream, class T>
inline void decode(const Table<T>& table, const uint8_t* packed, T* out) {
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  for (int part = 0; part < static_cast<int>(sizeof(T) / 2); ++part) {
    const __m512i copies = _mm512_shuffle_epi8(bytes, _mm512_load_si512(kSpread<T>.byte[part]));
    if constexpr (sizeof(T) == 4) {
      const __m512i codes = _mm512_srlv_epi32(copies, _mm512_set1_epi64(4));
      store_vector<kStream>(out + part * kLanes, _mm512_permutexvar_epi32(codes, table.v));
    } else {
      const __m512i codes = _mm512_srlv_epi16(copies, _mm512_set1_epi32(4));
      store_vector<kStream>(out, _mm512_permutexvar_epi16(codes, table.v));
    }
  }
}
inline void finish_streaming() { _mm_sfence(); }
inline Pairs decode_pairs(const Table<float>& table, const uint8_t* packed) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const auto values = [&table](__m512i codes) {  // in the low four bits
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(codes, table.v));
  };
  return {{values(_mm512_srli_epi32(bytes, 4))}, {values(bytes)}};
}

}  // namespace codec
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
