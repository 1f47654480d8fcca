// The vector vocabulary of the small-M kernels for AVX-512 (with VNNI where the file is compiled with it).
//
// A *chunk* is kLanes dwords of packed bytes: lane i holds the eight weights 8i .. 8i+7. Decoding takes one nibble of
// every lane at a time, so a product sum stays in the lane of its weights, and a lane, which lies in one quantization
// block, is scaled after the sum. x is arranged once a call to meet the weights in that order.

using Floats = __m512;
using Ints = __m512i;

inline constexpr int kLanes = 16;
inline constexpr int kLaneWeights = 8;
inline constexpr int kChunk = kLanes * kLaneWeights;
inline constexpr int kMaxIntRows = 16;       // rows of x whose sums fit the registers beside the decoded codes
inline constexpr int kMaxPairedIntRows = 8;  // the same beside the codes of two rows of W
inline constexpr int kMaxFloatRows = 8;
inline constexpr int kDxSums = 16;       // of dx that fit there, beside the codes that are met with them
inline constexpr int kRaggedDxRows = 8;  // up to which FloatDx is ahead of the panels

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints round_to_ints(Floats x) { return _mm512_cvtps_epi32(x); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
// Lane-wise largest |x|, by its bits: a NaN counts as larger than everything.
inline Ints max_bits(Ints seen, Floats x) {
  return _mm512_max_epu32(seen, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
// How many lanes have |x| >= bound; a NaN has not.
inline int count_at_least(Floats x, float bound) {
  return __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(x), splat(bound), _CMP_GE_OQ));
}
inline bool all_finite(Floats x) {
  return _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), zero(), _CMP_EQ_OQ) == 0xFFFF;  // inf - inf is NaN
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFFu : (1u << count) - 1u);
}

// kLanes elements as float32; of the last, only `count` are touched and the rest are 0.
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
  // Round to nearest even in integers: vcvtneps2bf16 flushes subnormals.
  const Ints bits = _mm512_castps_si512(x);
  const Ints odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Ints rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  const Ints quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const Ints out = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtepi32_epi16(out));
}
inline void store(float16* p, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// volatile, or GCC reads the memory again for each shift
inline Ints load_chunk(const uint8_t* p) { return *reinterpret_cast<const volatile __m512i_u*>(p); }
inline Ints load_chunk(const uint8_t* p, int64_t bytes) {
  return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1, p);
}

// Which of the granules from `scales` on each lane lies in, when the chunk starts `phase` weights into the first.
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

// Codes as float32, one a lane: vector s holds weight s ^ 1 of each lane.
struct FloatCodebook {
  Floats values;
  explicit FloatCodebook(const float* value) : values(_mm512_loadu_ps(value)) {}
};
struct FloatCodes {
  Floats v[8];
};
inline FloatCodes decode(Ints chunk, const FloatCodebook& book) {
  // vpermps looks at the low four bits of a lane.
  FloatCodes out;
  unroll<8>(
      [&](auto s) { out.v[s] = _mm512_permutexvar_ps(s ? _mm512_srli_epi32(chunk, 4 * s) : chunk, book.values); });
  return out;
}

// Which products are summed in a lane: those of the lane's own eight weights, or of any eight of the 32 around it,
// which is right where quantization blocks begin at such 32 and saves AVX2 (not AVX-512) a shuffle.
struct LaneOrder {};
using HalfOrder = LaneOrder;

// Codes as int16, two a lane: vector s holds weights s ^ 1 and 4 + (s ^ 1) of each lane.
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
  // vpermw looks at the low five bits of a word; the 16 codes stand twice in the table, so nothing need be masked.
  return {{_mm512_permutexvar_epi16(chunk, book.values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(chunk, 4), book.values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(chunk, 8), book.values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(chunk, 12), book.values)}};
}
// a.low * b.low + a.high * b.high in each lane, plus acc
inline Ints dot(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
inline Ints dot(Ints acc, Ints a, Ints b) {
#if __AVX512VNNI__
  return _mm512_dpwssd_epi32(acc, a, b);
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
// The same of bfloat16 pairs, in float32; subnormal factors and sums count as zero.
#if QLORA_BF16_DOT
inline Floats dot_bf16(Floats acc, Ints a, Ints b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#endif
inline Ints upper_halves(Floats x) { return _mm512_srli_epi32(_mm512_castps_si512(x), 16); }
inline Ints load_pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
// volatile, or GCC reads the memory again for each use
inline Ints load_pairs_once(const int16_t* p) { return *reinterpret_cast<const volatile __m512i_u*>(p); }
// A chunk of values that fit 16 bits -> four vectors of pairs in the order of IntCodes.
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

// Two rows' 64 weights: word 2l of the result is word l of `upper`, word 2l + 1 that of `lower`.
#define QLORA_INT_DX 1
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
// Nibble s of every word: weight 4l + (s ^ 1) of both rows in lane l.
template <int s>
inline Ints decode_nibble(Ints words, const IntCodebook& book) {
  return _mm512_permutexvar_epi16(s ? _mm512_srli_epi16(words, 4 * s) : words, book.values);
}
// The four nibbles' vectors -> 64 weights in their order.
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
// The words of one row's 64 weights, one a lane, and their nibbles in float32.
inline Ints load_words(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <int s>
inline Floats decode_nibble(Ints words, const FloatCodebook& book) {
  return _mm512_permutexvar_ps(s ? _mm512_srli_epi32(words, 4 * s) : words, book.values);
}
// The bits of |x| as a number.
inline Floats magnitude_bits(Floats x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(_mm512_abs_ps(x))); }
// A bit for each lane where a >= b, which a NaN is not; the first `count` bits; rounded where a lane's bit is set, else
// 0.
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

// out[j] = sum over lanes of rows[j], for kLanes rows: each step adds halves of two vectors into one.
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
