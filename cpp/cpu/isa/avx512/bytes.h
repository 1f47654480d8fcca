// The words of the vocabulary panel:: for int8 with AVX-512 VNNI. scalar/bytes.h says what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/code_tables.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// `added` is what is added to the bytes that are broadcast.
template <int added>
struct WordInt8Adding {
  using Word = int32_t;
  using Vector = U;
  using Sum = U;
  static constexpr int kRows = 1;
  static constexpr int kPartialSteps = 0;
  static int added_to(const Int8CodeTable&) { return added; }
  static constexpr int kAddedToDy = added;

  static Vector load(const Word* p) { return _mm512_loadu_si512(p); }
  static Vector broadcast(const Word* p) { return _mm512_set1_epi32(*p); }
  static Sum load_sum(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Sum splat_sum(int32_t x) { return _mm512_set1_epi32(x); }
  // As an intrinsic, GCC keeps many sums of a tile in memory.
  static Sum multiply_add(Vector broadcast, Vector lanes, Sum sum) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(broadcast), "v"(lanes));
    return sum;
  }
  static F to_floats(Sum sum, int /*row*/ = 0) { return _mm512_cvtepi32_ps(sum); }
  static Sum add_bytes(Vector x, Sum sum) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x); }
  static void store_sum(int32_t* p, Sum sum) { _mm512_storeu_si512(p, sum); }
  static void store(Word* p, Vector v) { _mm512_storeu_si512(p, v); }
  static F as_floats(Vector v) { return _mm512_castsi512_ps(v); }
  static void store_bits(Word* p, F bits) { _mm512_storeu_si512(p, _mm512_castps_si512(bits)); }

  template <Int8Order order>
  static float round(const F (&v)[4], Word* out) {
    const uint32_t bits = largest_magnitude(v);
    if (is_plain_segment(bits)) [[likely]] {
      const float largest = __builtin_bit_cast(float, bits);
      store(out, in_order<order>(rounded_times(v, splat(inverse_unit(largest)))));
      return largest / kInt8Largest;
    }
    float x[kInt8Segment];
    for (int i = 0; i < 4; ++i) panel::store(x + i * kLanes, v[i]);
    int8_t bytes[kInt8Segment];
    const float unit = round_segment(x, bytes);
    store(out, in_order<order>(_mm512_loadu_si512(bytes)));
    return unit;
  }
  // Fractions lie in the order from which packing makes bytes in memory order: quarters of 8 elements, in turn in two
  // vectors.
  static float round_to_fractions(const F (&v)[4], int16_t* out) {
    const uint32_t bits = largest_magnitude(v);
    const float largest = __builtin_bit_cast(float, bits);
    const F inverse = splat(has_fractions(bits) ? kMostFraction / largest : 0.0f);
    const auto nearest = [&](F x) { return _mm512_cvtps_epi32(has_fractions(bits) ? mul(x, inverse) : zero()); };
    const auto join_words = [&](F a, F b) {
      const __m512i both = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(nearest(a)));
      return _mm512_inserti64x4(both, _mm512_cvtepi32_epi16(nearest(b)), 1);
    };
    const U first = join_words(v[0], v[1]), second = join_words(v[2], v[3]);
    const U even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(first, even, second));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(first, odd, second));
    return largest;
  }
  // The largest products of 16 segments are found together.
  static void round_products(const int16_t* rows, const int16_t* scales, int64_t count, Word* out, int64_t stride,
                             float* factors) {
    const U scale[2] = {_mm512_loadu_si512(scales), _mm512_loadu_si512(scales + 32)};
    for (int64_t t = 0; t < count; t += kLanes) {
      const auto product = [&](int64_t row, int half) {
        return _mm512_mulhrs_epi16(_mm512_loadu_si512(rows + (t + row) * kInt8Segment + 32 * half), scale[half]);
      };
      const int some = static_cast<int>(count - t < kLanes ? count - t : kLanes);
      U most[kLanes];
      unroll<kLanes>([&](auto r) {
        const int64_t row = r.value < some ? r.value : 0;
        most[r.value] = _mm512_max_epu16(_mm512_abs_epi16(product(row, 0)), _mm512_abs_epi16(product(row, 1)));
      });
      const U pairs = largest_of_rows(most);  // of words
      const U largest =
          _mm512_max_epu32(_mm512_srli_epi32(pairs, 16), _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF)));
      const __mmask16 enough = _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32(kLeastProduct));
      // A float quotient does not round up to the next integer, so truncation gives that of the integers.
      const F quotient =
          _mm512_maskz_div_ps(enough, splat(static_cast<float>(kFactorOfOne)), _mm512_cvtepi32_ps(largest));
      const U factor = _mm512_cvttps_epi32(quotient);
      panel::store(factors + t, _mm512_cvtepi32_ps(factor));
      alignas(64) int32_t factor_of[kLanes];
      _mm512_store_si512(factor_of, factor);
      for (int r = 0; r < some; ++r) {
        const U by = _mm512_set1_epi16(static_cast<int16_t>(factor_of[r]));
        const U bytes =
            _mm512_packs_epi16(_mm512_mulhrs_epi16(product(r, 0), by), _mm512_mulhrs_epi16(product(r, 1), by));
        store(out + (t + r) * stride, _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(added))));
      }
    }
  }

  using Values = U;  // in each quarter
  static Values values_of(const Int8CodeTable& codes, int added_to_codes) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes.value));
    return _mm512_broadcast_i32x4(_mm_add_epi8(value, _mm_set1_epi8(static_cast<char>(added_to_codes))));
  }
  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    const U bytes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    const U twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), bytes);
    const U codes = _mm512_srlv_epi64(twice, _mm512_setr_epi64(4, 0, 4, 0, 4, 0, 4, 0));
    store(out, look_up(values, codes));
  }
  static void decode_lanes(const Values& values, const uint8_t* const (&packed)[4], bool halves, Word* out,
                           int64_t tile_stride) {
    if (halves) {
      unroll<2>([&](auto half) {
        // Each lane of a quarter of 8 lanes has four codes of one row, twice, of which vectors take different ones.
        const auto load_twice = [&](int row) {
          const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed[row] + half.value * 16));
          return _mm512_cvtepu16_epi32(_mm256_broadcastsi128_si256(some));
        };
        const U even = join(load_twice(0), load_twice(2)), odd = join(load_twice(1), load_twice(3));
        const auto shifts = [](int first, int second) {
          return _mm512_inserti64x4(_mm512_set1_epi32(second), _mm256_set1_epi32(first), 0);
        };
        Word* const to = out + half.value * tile_stride;
        store(to, words(values, even, odd, shifts(4, 0)));
        store(to + kLanes, words(values, even, odd, shifts(12, 8)));
      });
      return;
    }
    const U even = join(load_codes(packed[0]), load_codes(packed[2]));
    const U odd = join(load_codes(packed[1]), load_codes(packed[3]));
    store(out, words(values, even, odd, _mm512_set1_epi32(4)));
    store(out + kLanes, words(values, even, odd, _mm512_setzero_si512()));
    store(out + tile_stride, words(values, even, odd, _mm512_set1_epi32(12)));
    store(out + tile_stride + kLanes, words(values, even, odd, _mm512_set1_epi32(8)));
  }

 private:
  static U magnitude(F x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)); }
  static uint32_t largest_magnitude(const F (&v)[4]) {  // as bits
    return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_max_epu32(magnitude(v[0]), magnitude(v[1])),
                                                    _mm512_max_epu32(magnitude(v[2]), magnitude(v[3]))));
  }
  // The bytes of a segment times `inverse`, in memory order.
  static U rounded_times(const F (&v)[4], F inverse) {
    const auto nearest = [&](F x) { return _mm512_cvtps_epi32(mul(x, inverse)); };
    // Packing joins quarters of vectors: quarter i then has elements 4i .. 4i + 3 of each of v.
    const U bytes = _mm512_packs_epi16(_mm512_packs_epi32(nearest(v[0]), nearest(v[1])),
                                       _mm512_packs_epi32(nearest(v[2]), nearest(v[3])));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
  }
  template <Int8Order order>
  static U in_order(U bytes) {
    if constexpr (order == Int8Order::kMemory)
      return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(added)));
    const __m128i from = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(from));
  }
  // The largest words of each of 16 vectors, in the order of the vectors: of the even and of the odd ones.
  static U largest_of_rows(const U (&v)[kLanes]) {
    U pairs[8], fours[4], halves[2];  // of the largest, each stage in half as many vectors
    unroll<8>([&](auto i) {
      const U a = v[2 * i.value], b = v[2 * i.value + 1];
      pairs[i.value] = _mm512_max_epu16(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    });
    unroll<4>([&](auto i) {
      const U a = pairs[2 * i.value], b = pairs[2 * i.value + 1];
      fours[i.value] = _mm512_max_epu16(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    });
    const auto join_quarters = [](U a, U b) {
      return _mm512_max_epu16(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
    };
    unroll<2>([&](auto i) { halves[i.value] = join_quarters(fours[2 * i.value], fours[2 * i.value + 1]); });
    return join_quarters(halves[0], halves[1]);
  }
  static U look_up(const Values& values, U codes) {
    return _mm512_shuffle_epi8(values, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }
  static U join(U row, U next_row) { return _mm512_or_si512(row, _mm512_slli_epi32(next_row, 16)); }
  // Words of rows 0, 1, 2, 3 of the codes that lie `shift` bits above the low ones: those of rows 0 and 2 are in the
  // halves of a lane of `even`, those of rows 1 and 3 in `odd`.
  static U words(const Values& values, U even, U odd, U shift) {
    const U first = _mm512_srlv_epi32(even, shift),
            second = _mm512_rorv_epi32(odd, _mm512_sub_epi32(shift, _mm512_set1_epi32(8)));
    return look_up(values, _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAAu, first, second));
  }
};

using WordInt8 = WordInt8Adding<128>;  // which vpdpbusd multiplies

inline constexpr int kInt8Height = 7;
#ifdef __AVX512BF16__
inline constexpr bool kHasBf16Words = true;
#else
inline constexpr bool kHasBf16Words = false;
#endif

template <class Run>
void with_int8_word(const Int8CodeTable&, int /*blocks*/, const Run& run) {
  run(WordInt8());
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
