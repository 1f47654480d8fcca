// The words of the vocabulary panel:: for int8 with AVX2, and with AVX-VNNI. scalar/bytes.h says what each name means.
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

// What the words below share: they differ in how they multiply. `added_to_dy` is kAddedToDy.
template <int added_to_dy>
struct Int8Bytes {
  using Word = int32_t;
  using Vector = U;
  using Sum = U;
  static constexpr int kRows = 1;
  static constexpr int kAddedToDy = added_to_dy;

  static Vector load(const Word* p) { return _mm256_loadu_si256(reinterpret_cast<const U*>(p)); }
  static Vector broadcast(const Word* p) { return _mm256_set1_epi32(*p); }
  static Sum load_sum(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const U*>(p)); }
  static Sum splat_sum(int32_t x) { return _mm256_set1_epi32(x); }
  static F to_floats(Sum sum, int /*row*/ = 0) { return _mm256_cvtepi32_ps(sum); }
  static Sum add_bytes(Vector x, Sum sum) {
    const U pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void store_sum(int32_t* p, Sum sum) { _mm256_storeu_si256(reinterpret_cast<U*>(p), sum); }
  static void store(Word* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<U*>(p), v); }
  static F as_floats(Vector v) { return _mm256_castsi256_ps(v); }
  static void store_bits(Word* p, F bits) { _mm256_storeu_si256(reinterpret_cast<U*>(p), _mm256_castps_si256(bits)); }

  template <Int8Order order>
  static float round(const F (&v)[8], Word* out) {
    const uint32_t bits = largest_magnitude(v);
    float unit = 0.0f;
    U rounded[2];
    if (is_plain_segment(bits)) [[likely]] {
      const float largest = __builtin_bit_cast(float, bits);
      const F inverse = splat(inverse_unit(largest));
      unit = largest / kInt8Largest;
      const auto nearest = [&](F x) { return _mm256_cvtps_epi32(mul(x, inverse)); };
      // Packing joins halves of vectors: each then has elements 4i .. 4i + 3 of four vectors.
      unroll<2>([&](auto i) {
        const F* const four = v + 4 * i.value;
        const U bytes = _mm256_packs_epi16(_mm256_packs_epi32(nearest(four[0]), nearest(four[1])),
                                           _mm256_packs_epi32(nearest(four[2]), nearest(four[3])));
        rounded[i.value] = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      });
    } else {
      alignas(32) float x[kInt8Segment];
      alignas(32) int8_t bytes[kInt8Segment];
      for (int i = 0; i < 8; ++i) panel::store(x + i * kLanes, v[i]);
      unit = round_segment(x, bytes);
      __builtin_memcpy(rounded, bytes, sizeof(bytes));
    }
    unroll<2>([&](auto i) {
      U& half_segment = rounded[i.value];
      if constexpr (order == Int8Order::kDecoded) {
        const __m128i from = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        half_segment = _mm256_shuffle_epi8(half_segment, _mm256_broadcastsi128_si256(from));
      } else {
        half_segment = _mm256_add_epi8(half_segment, _mm256_set1_epi8(static_cast<char>(kAddedToDy)));
      }
      store(out + i.value * kLanes, half_segment);
    });
    return unit;
  }

  // Fractions lie in the order from which packing makes bytes in memory order: vectors 2i and 2i + 1 have 32 elements,
  // and halves of 8 in turn.
  static float round_to_fractions(const F (&v)[8], int16_t* out) {
    const uint32_t bits = largest_magnitude(v);
    const float largest = __builtin_bit_cast(float, bits);
    const F inverse = splat(has_fractions(bits) ? kMostFraction / largest : 0.0f);
    const auto nearest = [&](F x) { return _mm256_cvtps_epi32(has_fractions(bits) ? mul(x, inverse) : zero()); };
    unroll<2>([&](auto half) {
      const F* const four = v + 4 * half.value;
      const auto store_pair = [&](F a, F b, int at) {
        store(reinterpret_cast<Word*>(out + 32 * half.value + at), _mm256_packs_epi32(nearest(a), nearest(b)));
      };
      // Packing takes halves in turn, so these bring elements 0 .. 7 and 16 .. 23 together, and 8 .. 15 and 24 .. 31.
      store_pair(_mm256_permute2f128_ps(four[0], four[2], 0x20), _mm256_permute2f128_ps(four[0], four[2], 0x31), 0);
      store_pair(_mm256_permute2f128_ps(four[1], four[3], 0x20), _mm256_permute2f128_ps(four[1], four[3], 0x31), 16);
    });
    return largest;
  }
  static void round_products(const int16_t* rows, const int16_t* scales, int64_t count, Word* out, int64_t stride,
                             float* factors) {
    const auto load_fractions = [](const int16_t* p) { return load(reinterpret_cast<const Word*>(p)); };
    for (int64_t t = 0; t < count; ++t, rows += kInt8Segment, out += stride) {
      U product[4], most = _mm256_setzero_si256();
      unroll<4>([&](auto i) {
        product[i.value] =
            _mm256_mulhrs_epi16(load_fractions(rows + 16 * i.value), load_fractions(scales + 16 * i.value));
        most = _mm256_max_epu16(most, _mm256_abs_epi16(product[i.value]));
      });
      const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
      const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
      const int32_t largest = 0xFFFF & ~_mm_cvtsi128_si32(least);
      // A float quotient does not round up to the next integer, so truncation gives that of the integers.
      const float quotient = static_cast<float>(kFactorOfOne) / static_cast<float>(largest);
      const int32_t factor = largest < kLeastProduct ? 0 : static_cast<int32_t>(quotient);
      const U by = _mm256_set1_epi16(static_cast<int16_t>(factor));
      unroll<2>([&](auto i) {
        const U bytes = _mm256_packs_epi16(_mm256_mulhrs_epi16(product[2 * i.value], by),
                                           _mm256_mulhrs_epi16(product[2 * i.value + 1], by));
        store(out + i.value * kLanes, _mm256_add_epi8(bytes, _mm256_set1_epi8(static_cast<char>(kAddedToDy))));
      });
      factors[t] = static_cast<float>(factor);
    }
  }

  using Values = U;  // in each half
  static Values values_of(const Int8CodeTable& codes, int added) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes.value));
    return _mm256_broadcastsi128_si256(_mm_add_epi8(value, _mm_set1_epi8(static_cast<char>(added))));
  }
  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    const U bytes = _mm256_loadu_si256(reinterpret_cast<const U*>(packed)), shifts = _mm256_setr_epi64x(4, 0, 4, 0);
    store(out, look_up(values, _mm256_srlv_epi64(_mm256_permute4x64_epi64(bytes, 0x50), shifts)));
    store(out + kLanes, look_up(values, _mm256_srlv_epi64(_mm256_permute4x64_epi64(bytes, 0xFA), shifts)));
  }
  // A group of lanes has 32 columns, so the order with `halves` is the same.
  static void decode_lanes(const Values& values, const uint8_t* const (&packed)[4], bool /*halves*/, Word* out,
                           int64_t tile_stride) {
    unroll<2>([&](auto group) {
      const auto codes = [&](int row) { return load_codes(packed[row] + group.value * 16); };
      const U even = _mm256_or_si256(codes(0), _mm256_slli_epi32(codes(2), 16));  // rows 0 and 2 in halves of lanes
      const U odd = _mm256_or_si256(codes(1), _mm256_slli_epi32(codes(3), 16));
      Word* const to = out + group.value * 2 * tile_stride;
      store(to, words<4>(values, even, odd));
      store(to + kLanes, words<0>(values, even, odd));
      store(to + tile_stride, words<12>(values, even, odd));
      store(to + tile_stride + kLanes, words<8>(values, even, odd));
    });
  }

 private:
  static uint32_t largest_magnitude(const F (&v)[8]) {  // as bits
    U most = _mm256_setzero_si256();
    unroll<8>([&](auto i) {
      const U magnitude = _mm256_and_si256(_mm256_castps_si256(v[i.value]), _mm256_set1_epi32(0x7FFFFFFF));
      most = _mm256_max_epu32(most, magnitude);
    });
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4E));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
  }
  static U look_up(const Values& values, U codes) {
    return _mm256_shuffle_epi8(values, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
  }
  // Words of rows 0, 1, 2, 3 of the codes that lie `shift` bits above the low ones.
  template <int shift>
  static U words(const Values& values, U even, U odd) {
    const U second = shift >= 8 ? _mm256_srli_epi32(odd, shift - 8) : _mm256_slli_epi32(odd, 8 - shift);
    return look_up(values, _mm256_blendv_epi8(_mm256_srli_epi32(even, shift), second, _mm256_set1_epi16(-256)));
  }
};

inline constexpr bool kHasBf16Words = false;
inline constexpr int kInt8Height = 3;

#ifdef __AVXVNNI__

struct WordInt8 : Int8Bytes<128> {
  static constexpr int kPartialSteps = 0;
  static int added_to(const Int8CodeTable&) { return 128; }
  // As an intrinsic, GCC keeps most sums of a tile in memory.
  static Sum multiply_add(Vector broadcast, Vector lanes, Sum sum) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(broadcast), "x"(lanes));
    return sum;
  }
};

template <class Run>
void with_int8_word(const Int8CodeTable&, int /*blocks*/, const Run& run) {
  run(WordInt8());
}

#else

// Any codes. vpmaddubsw multiplies unsigned by signed bytes and saturates the sum of two products: magnitudes up to 127
// leave it in range.
struct WordInt8 : Int8Bytes<0> {
  static constexpr int kPartialSteps = 0;
  static int added_to(const Int8CodeTable&) { return 0; }
  static Sum multiply_add(Vector broadcast, Vector lanes, Sum sum) {
    const U pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(broadcast), _mm256_sign_epi8(lanes, broadcast));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// Codes that are small integers, so that int16 hold the sums of `steps` steps: two products each, of at most
// 127 * (most - least) in the forward and 254 * magnitude in dX.
template <int steps>
struct WordSmallInt8 : Int8Bytes<127> {
  static constexpr int kPartialSteps = steps;
  static int added_to(const Int8CodeTable& codes) { return -codes.least; }
  static bool holds(const Int8CodeTable& codes) {
    const int magnitude = codes.most > -codes.least ? codes.most : -codes.least;
    return 2 * steps * 127 * (codes.most - codes.least) <= 32767 && 2 * steps * 254 * magnitude <= 32767;
  }

  using Partial = U;
  static Partial no_partial() { return _mm256_setzero_si256(); }
  // As intrinsics, GCC keeps most sums of a tile in memory.
  static Partial multiply_add(Vector broadcast, Vector lanes, Partial sum) {
    Vector products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(broadcast), "x"(lanes));
    return sum;
  }
  static Sum add_partial(Partial partial, Sum sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(partial, _mm256_set1_epi16(1)));
  }
};

template <class Run>
void with_int8_word(const Int8CodeTable& codes, int blocks, const Run& run) {
  if (blocks <= 2 && WordSmallInt8<8>::holds(codes)) return run(WordSmallInt8<8>());
  if (WordSmallInt8<4>::holds(codes)) return run(WordSmallInt8<4>());
  run(WordInt8());
}

#endif

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
