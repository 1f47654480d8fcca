// The vocabulary stream:: for AVX2 + FMA + F16C. scalar/stream.h says what each name means. vpshufb looks up one byte
// of the values of 32 codes at a time. The bytes are then interleaved to int16 or float32.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/avx2/bfloat16.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

using Floats = __m256;
using Ints = __m256i;
using Chunk = Ints;
using LaneGranules = Ints;
using Pairs = Ints;

inline constexpr int kLanes = 8;
inline constexpr int kLaneWeights = 8;
inline constexpr int kChunk = kLanes * kLaneWeights;
inline constexpr int kMaxIntTokens = 8;
inline constexpr int kMaxPairedIntTokens = 0;
inline constexpr int kMaxFloatTokens = 4;
inline constexpr int kDxSums = 32;  // more than 16 registers hold, but GCC spills them as well as a loop would

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats absolute(Floats x) { return _mm256_andnot_ps(splat(-0.0f), x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints round_to_ints(Floats x) { return _mm256_cvtps_epi32(x); }
inline float sum(Floats x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline Ints max_bits(Ints seen, Floats x) {
  return _mm256_max_epu32(seen, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF)));
}
inline int count_at_least(Floats x, float bound) {
  return __builtin_popcount(
      static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(absolute(x), splat(bound), _CMP_GE_OQ))));
}
inline bool all_finite(Floats x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_sub_ps(x, x), zero(), _CMP_EQ_OQ)) == 0xFF;
}

inline Ints lane_number() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Ints first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count < kLanes ? count : kLanes)), lane_number());
}

// Loads the first `count` of kLanes 16-bit elements. The others are 0.
inline __m128i load_words(const void* p, int64_t count) {
  if (count >= kLanes) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  alignas(16) uint16_t word[kLanes] = {};
  __builtin_memcpy(word, p, static_cast<size_t>(2 * count));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(word));
}
inline void store_words(void* p, __m128i x, int64_t count) {
  if (count >= kLanes) return _mm_storeu_si128(static_cast<__m128i*>(p), x);
  alignas(16) uint16_t word[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(word), x);
  __builtin_memcpy(p, word, static_cast<size_t>(2 * count));
}
inline Floats load(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_lanes(count)); }
inline Floats load(const bfloat16* p, int64_t count) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(p, count)), 16));
}
inline Floats load(const float16* p, int64_t count) { return _mm256_cvtph_ps(load_words(p, count)); }
inline void store(float* p, Floats x, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), x); }
inline void store(bfloat16* p, Floats x, int64_t count) { store_words(p, round_to_bfloat16(x), count); }
inline void store(float16* p, Floats x, int64_t count) {
  store_words(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), count);
}

inline Ints load_chunk(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints load_chunk(const uint8_t* p, int64_t bytes) {
  if (bytes >= 32) return load_chunk(p);
  alignas(32) uint8_t byte[32] = {};
  __builtin_memcpy(byte, p, static_cast<size_t>(bytes));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(byte));
}

inline Ints granule_of_lanes(int phase, int log2_granule) {
  const Ints weight = _mm256_slli_epi32(lane_number(), 3);
  return _mm256_srl_epi32(_mm256_add_epi32(weight, _mm256_set1_epi32(phase)), _mm_cvtsi32_si128(log2_granule));
}
inline Floats lane_scales(const float* scales, Ints granules) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), granules);
}
inline Floats lane_scales(const float* scales, Ints granules, int64_t lanes) {
  return _mm256_and_ps(lane_scales(scales, granules), _mm256_castsi256_ps(first_lanes(lanes)));
}

inline Ints low_nibbles(Ints bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }

struct CodeSet {
  Ints has;  // in both halves
  explicit CodeSet(const uint8_t* has_)
      : has(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(has_)))) {}
};
inline int count_bytes_with(const CodeSet& codes, Ints chunk) {
  const Ints low = _mm256_shuffle_epi8(codes.has, low_nibbles(chunk));
  const Ints high = _mm256_shuffle_epi8(codes.has, high_nibbles(chunk));
  return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_epi8(_mm256_or_si256(low, high))));
}

// Byte `plane` of each of 16 values of `kBytes` bytes, in both halves.
inline Ints byte_plane(const void* value, int bytes, int plane) {
  alignas(16) uint8_t out[kCodes];
  for (int i = 0; i < kCodes; ++i) out[i] = static_cast<const uint8_t*>(value)[i * bytes + plane];
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(out)));
}

struct FloatCodebook {
  Ints plane[4];
  explicit FloatCodebook(const float* value) {
    for (int i = 0; i < 4; ++i) plane[i] = byte_plane(value, 4, i);
  }
};
struct FloatCodes {
  Floats v[8];
};
inline FloatCodes decode(Ints chunk, const FloatCodebook& book) {
  // A 4x4 byte transpose in each half, so that the unpacks below take the bytes of a lane's dword in order.
  const Ints transpose =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const Ints bytes = _mm256_shuffle_epi8(chunk, transpose);
  FloatCodes out;
  unroll<2>([&](auto high) {
    const Ints code = high ? high_nibbles(bytes) : low_nibbles(bytes);
    const Ints b0 = _mm256_shuffle_epi8(book.plane[0], code), b1 = _mm256_shuffle_epi8(book.plane[1], code);
    const Ints b2 = _mm256_shuffle_epi8(book.plane[2], code), b3 = _mm256_shuffle_epi8(book.plane[3], code);
    const Ints low0 = _mm256_unpacklo_epi8(b0, b1), high0 = _mm256_unpacklo_epi8(b2, b3);
    const Ints low1 = _mm256_unpackhi_epi8(b0, b1), high1 = _mm256_unpackhi_epi8(b2, b3);
    out.v[high] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
    out.v[2 + high] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
    out.v[4 + high] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
    out.v[6 + high] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
  });
  return out;
}

// The order in which bytes are looked up, and the weight that is word `word` of a lane of vector s in that order.
struct LaneOrder {
  static Ints bytes(Ints chunk) {
    // The first two bytes of every dword of a half, then the last two.
    return _mm256_shuffle_epi8(
        chunk, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
  }
  static constexpr int weight(int s, int lane, int word) {
    return kLaneWeights * lane + 2 * (s & 2) + 2 * word + (1 - (s & 1));
  }
};
struct HalfOrder {
  static Ints bytes(Ints chunk) { return chunk; }
  static constexpr int weight(int s, int lane, int word) {
    return 32 * (lane / 4) + 8 * (s & 2) + 4 * (lane % 4) + 2 * word + (1 - (s & 1));
  }
};
struct IntCodebook {
  Ints plane[2];
  explicit IntCodebook(const int16_t* value) : plane{byte_plane(value, 2, 0), byte_plane(value, 2, 1)} {}
};
struct IntCodes {
  Ints v[4];
};
template <class Order>
inline IntCodes decode(Ints chunk, const IntCodebook& book, Order) {
  const Ints bytes = Order::bytes(chunk);
  const Ints odd = low_nibbles(bytes), even = high_nibbles(bytes);
  const Ints odd0 = _mm256_shuffle_epi8(book.plane[0], odd), odd1 = _mm256_shuffle_epi8(book.plane[1], odd);
  const Ints even0 = _mm256_shuffle_epi8(book.plane[0], even), even1 = _mm256_shuffle_epi8(book.plane[1], even);
  return {{_mm256_unpacklo_epi8(odd0, odd1), _mm256_unpacklo_epi8(even0, even1), _mm256_unpackhi_epi8(odd0, odd1),
           _mm256_unpackhi_epi8(even0, even1)}};
}
inline Ints dot(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
inline Ints dot(Ints acc, Ints a, Ints b) {
#ifdef __AVXVNNI__
  return _mm256_dpwssd_avx_epi32(acc, a, b);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}
inline Ints load_pairs(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints load_pairs_once(const int16_t* p) { return *reinterpret_cast<const volatile __m256i_u*>(p); }
template <class Order>
inline void store_in_code_order(const Ints (&value)[8], int16_t* out, Order) {
  int32_t weight[kChunk];
  __builtin_memcpy(weight, value, sizeof(weight));
  for (int s = 0; s < 4; ++s)
    for (int i = 0; i < kLanes; ++i)
      for (int word = 0; word < 2; ++word) *out++ = static_cast<int16_t>(weight[Order::weight(s, i, word)]);
}
// In HalfOrder, a vector holds the odd or the even ones of 16 weights from each half of the chunk.
inline void store_in_code_order(const Ints (&value)[8], int16_t* out, HalfOrder) {
  const auto in_order = [](Ints packed) { return _mm256_permute4x64_epi64(packed, 0xD8); };
  unroll<2>([&](auto part) {
    const Ints first = in_order(_mm256_packs_epi32(value[2 * part], value[2 * part + 1]));
    const Ints second = in_order(_mm256_packs_epi32(value[2 * part + 4], value[2 * part + 5]));
    const auto store_words = [&](Ints a, Ints b) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), in_order(_mm256_packs_epi32(a, b)));
      out += 2 * kLanes;
    };
    store_words(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16));
    const auto even = [](Ints words) { return _mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16); };
    store_words(even(first), even(second));
  });
}

inline Floats sums_of(const float* rows) {
  const Floats a = _mm256_hadd_ps(load(rows), load(rows + 8)), b = _mm256_hadd_ps(load(rows + 16), load(rows + 24));
  const Floats c = _mm256_hadd_ps(load(rows + 32), load(rows + 40)),
               d = _mm256_hadd_ps(load(rows + 48), load(rows + 56));
  const Floats low = _mm256_hadd_ps(a, b), high = _mm256_hadd_ps(c, d);
  return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
