#include "card_sum.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "fragments.h"

namespace cudasim {

CardSum card_sum(int arch, bool wgmma, Ty a, Ty b, Ty result, int K) {
  const int bits = element_bits(a);
  const bool fp8 = bits == 8;
  const auto least = [](Ty t) { return t == Ty::f16 || t == Ty::e5m2 ? -14 : t == Ty::e4m3 ? -6 : -126; };
  CardSum card;
  card.terms = arch < 90 ? std::min(K, 128 / bits) : K;
  card.fraction = wgmma && fp8 ? 13 : arch < 90 ? 24 : 25;
  card.kept = wgmma && fp8 ? 13 : 23;
  card.min_a = least(a);
  card.min_b = least(b);
  card.half = result == Ty::f16;
  return card;
}

namespace {

constexpr int kZeroExponent = -126;  // how zeros take part in the choice of the largest exponent
constexpr int kMostTerms = 32;
constexpr int kExactTerms = 8;  // so many terms below 2^27 and an accumulator fit an int32

// 8 numbers as significand * 2^exponent, the significand below 2. It is below 1 only if the exponent is the least.
struct Split {
  __m256 significand;
  __m256i exponent;
};
__m256 power_of_two(__m256i e) {  // e >= -126
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
}
Split split(__m256 x, int min_exponent) {
  const __m256i field = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(255));
  const __m256i e = _mm256_max_epi32(_mm256_sub_epi32(field, _mm256_set1_epi32(127)), _mm256_set1_epi32(min_exponent));
  // 2^-e may be out of range, but its two factors are not.
  const __m256i first = _mm256_srai_epi32(e, 1), second = _mm256_sub_epi32(e, first), zero = _mm256_setzero_si256();
  const __m256 s = _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(_mm256_sub_epi32(zero, first))),
                                 power_of_two(_mm256_sub_epi32(zero, second)));
  const __m256 is_zero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ);
  return {s, _mm256_blendv_epi8(e, _mm256_set1_epi32(kZeroExponent), _mm256_castps_si256(is_zero))};
}
bool finite(const float* p, int n) {
  return std::all_of(p, p + n, [](float x) { return std::isfinite(x); });
}

// The terms cut to integers, in units of the last bit that takes part. A shift far below 0 leaves nothing.
__m256i cut(__m256 significand, __m256i shift) {
  return _mm256_cvttps_epi32(
      _mm256_mul_ps(significand, power_of_two(_mm256_max_epi32(shift, _mm256_set1_epi32(-126)))));
}

// Cuts four doubles to float32. Magnitudes of 2^128 and more become infinity.
__m128 cut_to_float(__m256d x) {
  const __m256d no_sign = _mm256_castsi256_pd(_mm256_set1_epi64x(std::numeric_limits<int64_t>::max()));
  const __m256d magnitude = _mm256_and_pd(x, no_sign);
  const __m128 nearest = _mm256_cvtpd_ps(x);
  const auto narrow = [](__m256d mask) {
    return _mm256_castsi256_si128(
        _mm256_permutevar8x32_epi32(_mm256_castpd_si256(mask), _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
  };
  const __m256d too_large = _mm256_cmp_pd(_mm256_and_pd(_mm256_cvtps_pd(nearest), no_sign), magnitude, _CMP_GT_OQ);
  const __m256d overflow = _mm256_cmp_pd(magnitude, _mm256_set1_pd(0x1p128), _CMP_GE_OQ);
  // The float before, in magnitude, has the bit pattern before.
  const __m128i down = _mm_add_epi32(_mm_castps_si128(nearest), narrow(too_large));
  return _mm_blendv_ps(_mm_castsi128_ps(down), nearest, _mm_castsi128_ps(narrow(overflow)));
}

// Where an operand is not finite: the sum of exact products, which overflows nowhere.
float special_sum(int terms, const float* a, const float* b, float c) {
  double sum = c;
  for (int k = 0; k < terms; ++k) sum += double(a[k]) * b[8 * k];
  return std::isnan(sum) ? as_float(0x7fffffff) : float(sum);
}

}  // namespace

void add_as_card(const CardSum& card, int rows, int K, const float* A, const float* B, float* acc) {
  alignas(32) float sa[16 * kMostTerms];
  alignas(32) int32_t ea[16 * kMostTerms];
  Split b[kMostTerms];
  for (int i = 0; i < rows * K; i += 8) {
    const Split x = split(_mm256_loadu_ps(A + i), card.min_a);
    _mm256_store_ps(sa + i, x.significand);
    _mm256_store_si256(reinterpret_cast<__m256i*>(ea + i), x.exponent);
  }
  for (int k = 0; k < K; ++k) b[k] = split(_mm256_loadu_ps(B + 8 * k), card.min_b);
  const bool operands_finite = finite(A, rows * K) && finite(B, 8 * K);
  for (int r = 0; r < rows; ++r) {
    float* const sum = acc + 8 * r;
    for (int first = 0; first < K; first += card.terms) {
      const int terms = std::min(card.terms, K - first);
      float before[8];
      std::copy_n(sum, 8, before);
      const Split c = split(_mm256_loadu_ps(sum), card.half ? -14 : -126);
      const auto exponent = [&](int k) { return _mm256_add_epi32(_mm256_set1_epi32(ea[r * K + k]), b[k].exponent); };
      __m256i largest = c.exponent;
      for (int k = first; k < first + terms; ++k) largest = _mm256_max_epi32(largest, exponent(k));
      const __m256i scale = _mm256_sub_epi32(_mm256_set1_epi32(card.fraction), largest);
      __m256i part = cut(c.significand, _mm256_add_epi32(c.exponent, scale));
      __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
      for (int k = first, end = first + terms; k < end;) {
        for (const int stop = std::min(k + kExactTerms, end); k < stop; ++k)
          part = _mm256_add_epi32(part, cut(_mm256_mul_ps(_mm256_set1_ps(sa[r * K + k]), b[k].significand),
                                            _mm256_add_epi32(exponent(k), scale)));
        low = _mm256_add_pd(low, _mm256_cvtepi32_pd(_mm256_castsi256_si128(part)));
        high = _mm256_add_pd(high, _mm256_cvtepi32_pd(_mm256_extracti128_si256(part, 1)));
        part = _mm256_setzero_si256();
      }
      const auto unscaled = [&](__m256d x, __m128i s) {  // x * 2^-s
        const __m256i e = _mm256_sub_epi64(_mm256_set1_epi64x(1023), _mm256_cvtepi32_epi64(s));
        return _mm256_mul_pd(x, _mm256_castsi256_pd(_mm256_slli_epi64(e, 52)));
      };
      low = unscaled(low, _mm256_castsi256_si128(scale));
      high = unscaled(high, _mm256_extracti128_si256(scale, 1));
      if (card.half) {
        alignas(32) double exact[8];
        _mm256_store_pd(exact, low);
        _mm256_store_pd(exact + 4, high);
        for (int i = 0; i < 8; ++i) sum[i] = f16_to_f32(uint16_t(encode(exact[i], kF16, Round::rn)));
      } else {
        const __m256i mask = _mm256_set1_epi32(int32_t(~0u << (23 - card.kept)));
        const __m256 whole = _mm256_set_m128(cut_to_float(high), cut_to_float(low));
        _mm256_storeu_ps(sum, _mm256_and_ps(whole, _mm256_castsi256_ps(mask)));
      }
      if (operands_finite && finite(before, 8)) continue;
      for (int i = 0; i < 8; ++i)
        if (const float x = special_sum(terms, A + r * K + first, B + 8 * first + i, before[i]); !std::isfinite(x))
          sum[i] = x;
    }
  }
}

void add_in_order(int rows, int K, const float* A, const float* B, float* acc) {
  for (int first = 0; first < rows; first += 8) {
    __m256 c[8];
    for (int i = 0; i < 8; ++i) c[i] = _mm256_loadu_ps(acc + 8 * (first + i));
    for (int k = 0; k < K; ++k) {
      const __m256 x = _mm256_loadu_ps(B + 8 * k);
      for (int i = 0; i < 8; ++i) c[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(A + (first + i) * K + k), x, c[i]);
    }
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(acc + 8 * (first + i), c[i]);
  }
}

}  // namespace cudasim
