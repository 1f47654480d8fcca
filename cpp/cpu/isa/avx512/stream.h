// The vocabulary stream:: for AVX-512 (with VNNI where the set has it). scalar/stream.h says what each name means;
// row_pairs.h beside this file has the words of dx's integer kernel.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/avx512/bfloat16.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

using Floats = __m512;
using Ints = __m512i;
using Chunk = Ints;
using LaneGranules = Ints;
using Pairs = Ints;

inline constexpr int kLanes = 16;
inline constexpr int kLaneWeights = 8;
inline constexpr int kChunk = kLanes * kLaneWeights;
inline constexpr int kMaxIntTokens = 16;
inline constexpr int kMaxPairedIntTokens = 8;
inline constexpr int kMaxFloatTokens = 8;
inline constexpr int kDxSums = 16;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints round_to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline Ints max_bits(Ints seen, Floats x) {
  return _mm512_max_epu32(seen, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
inline int count_at_least(Floats x, float bound) {
  return __builtin_popcount(_mm512_cmp_ps_mask(absolute(x), splat(bound), _CMP_GE_OQ));
}
inline bool all_finite(Floats x) {
  return _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), zero(), _CMP_EQ_OQ) == 0xFFFF;  // inf - inf is NaN
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFFu : (1u << count) - 1u);
}

inline Floats load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline Floats load(const bfloat16* p, int64_t count) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p)), 16));
}
inline Floats load(const float16* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline void store(float* p, Floats x, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
inline void store(bfloat16* p, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), round_to_bfloat16(x));
}
inline void store(float16* p, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The load is volatile, because GCC would read the memory again for each shift.
inline Ints load_chunk(const uint8_t* p) { return *reinterpret_cast<const volatile __m512i_u*>(p); }
inline Ints load_chunk(const uint8_t* p, int64_t bytes) {
  return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1, p);
}

struct CodeSet {
  Ints has;  // four times, because vpermb uses the low six bits of a byte
  explicit CodeSet(const uint8_t* has_)
      : has(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(has_)))) {}
};
inline int count_bytes_with(const CodeSet& codes, Ints chunk) {
  const Ints low = _mm512_permutexvar_epi8(chunk, codes.has);
  const Ints high = _mm512_permutexvar_epi8(_mm512_srli_epi16(chunk, 4), codes.has);
  return __builtin_popcountll(_mm512_movepi8_mask(_mm512_or_si512(low, high)));
}

inline Ints granule_of_lanes(int phase, int log2_granule) {
  const Ints weight = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  return _mm512_srl_epi32(_mm512_add_epi32(weight, _mm512_set1_epi32(phase)), _mm_cvtsi32_si128(log2_granule));
}
inline Floats lane_scales(const float* scales, Ints granules) {
  return _mm512_permutexvar_ps(granules, _mm512_loadu_ps(scales));
}
inline Floats lane_scales(const float* scales, Ints granules, int64_t lanes) {
  return _mm512_maskz_permutexvar_ps(first_lanes(lanes), granules, _mm512_loadu_ps(scales));
}

struct FloatCodebook {
  Floats values;
  explicit FloatCodebook(const float* value) : values(_mm512_loadu_ps(value)) {}
};
struct FloatCodes {
  Floats v[8];
};
inline FloatCodes decode(Ints chunk, const FloatCodebook& book) {
  // vpermps uses the low four bits of a lane.
  FloatCodes out;
  unroll<8>(
      [&](auto s) { out.v[s] = _mm512_permutexvar_ps(s ? _mm512_srli_epi32(chunk, 4 * s) : chunk, book.values); });
  return out;
}

struct LaneOrder {};
using HalfOrder = LaneOrder;

struct IntCodebook {
  Ints values;
  explicit IntCodebook(const int16_t* value) {
    values = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value)));
  }
};
struct IntCodes {
  Ints v[4];
};
inline IntCodes decode(Ints chunk, const IntCodebook& book, LaneOrder) {
  // vpermw uses the low five bits of a word. The table has the 16 values twice, so that no bit has to be masked.
  return {{_mm512_permutexvar_epi16(chunk, book.values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(chunk, 4), book.values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(chunk, 8), book.values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(chunk, 12), book.values)}};
}
inline Ints dot(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
inline Ints dot(Ints acc, Ints a, Ints b) { return _mm512_dpwssd_epi32(acc, a, b); }
inline Ints load_pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
// The load is volatile, because GCC would read the memory again for each use.
inline Ints load_pairs_once(const int16_t* p) { return *reinterpret_cast<const volatile __m512i_u*>(p); }
inline void store_in_code_order(const Ints (&value)[8], int16_t* out, LaneOrder) {
  const Ints pairs_of_lane =
      _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
  Ints lanes[4];  // four lanes each, a lane's pairs side by side
  unroll<4>([&](auto q) {
    const Ints words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(value[2 * q])),
                                          _mm512_cvtepi32_epi16(value[2 * q + 1]), 1);
    lanes[q] = _mm512_shuffle_epi8(words, pairs_of_lane);
  });
  // Pairs s and s + 1 of the eight lanes of two vectors.
  const auto of_two = [](Ints a, Ints b, int s) {
    const Ints from = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    return _mm512_permutex2var_epi32(a, _mm512_add_epi32(from, _mm512_set1_epi32(s)), b);
  };
  for (int s = 0; s < 4; s += 2) {
    const Ints low = of_two(lanes[0], lanes[1], s), high = of_two(lanes[2], lanes[3], s);
    _mm512_storeu_si512(out + s * 2 * kLanes, _mm512_shuffle_i64x2(low, high, 0x44));
    _mm512_storeu_si512(out + (s + 1) * 2 * kLanes, _mm512_shuffle_i64x2(low, high, 0xEE));
  }
}

// Each step adds halves of two vectors into one.
inline Floats sums_of(const float* rows) {
  Floats v[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = load(rows + i * kLanes);
  for (int i = 0; i < 8; ++i) {  // v[i] | v[i + 8], halves of 8 lanes
    const Floats low = _mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), high = _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE);
    v[i] = add(low, high);
  }
  for (int i = 0; i < 4; ++i) {  // quarters: lanes of v[i], v[i + 4], v[i + 8], v[i + 12]
    const Floats low = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), high = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xDD);
    v[i] = add(low, high);
  }
  // quarter q of v[i] now belongs to row i + 8 * (q & 1) + 4 * (q >> 1)
  const Floats a = add(_mm512_unpacklo_ps(v[0], v[2]), _mm512_unpackhi_ps(v[0], v[2]));
  const Floats b = add(_mm512_unpacklo_ps(v[1], v[3]), _mm512_unpackhi_ps(v[1], v[3]));
  const Floats c = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  return _mm512_shuffle_f32x4(c, c, 0xD8);
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
