// The words of the vocabulary panel:: for int8 in plain C++, the definition of what the kernels of int8 ask for.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// Four int8 of the summed dimension, multiplied and summed exactly in int32. Instructions may multiply unsigned by
// signed bytes: then something is added to the bytes that are broadcast.
struct WordInt8 {
  using Word = int32_t;
  // Rows that are multiplied at once, and words of each: two where an instruction multiplies matrices. A Sum then has
  // kLanes sums of each of kRows rows, decode_lanes takes 4 * kRows rows, and panels are those that
  // many_tokens/multiply_int8-inl.h draws.
  static constexpr int kRows = 1;
  struct Vector {
    int8_t byte[4 * kLanes];
  };
  struct Sum {
    int32_t lane[kLanes];
  };
  // The steps after which a Partial sum has to be added to a Sum, or 0 where products are added to a Sum at once.
  static constexpr int kPartialSteps = 0;
  // What is added to bytes that are broadcast: W's, and those of dy.
  static int added_to(const Int8CodeTable&) { return 0; }
  static constexpr int kAddedToDy = 0;

  static Vector load(const Word* p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static Vector broadcast(const Word* p) {
    Vector v;
    for (int i = 0; i < kLanes; ++i) __builtin_memcpy(v.byte + 4 * i, p, sizeof(*p));
    return v;
  }
  static Sum load_sum(const int32_t* p) {
    Sum s;
    __builtin_memcpy(&s, p, sizeof(s));
    return s;
  }
  static Sum splat_sum(int32_t x) {
    Sum s;
    for (int32_t& lane : s.lane) lane = x;
    return s;
  }
  // The sums of the four products of each lane, added to `sum`.
  static Sum multiply_add(Vector broadcast, Vector lanes, Sum sum) {
    for (int i = 0; i < 4 * kLanes; ++i) sum.lane[i / 4] += int32_t{broadcast.byte[i]} * lanes.byte[i];
    return sum;
  }
  static F to_floats(Sum sum, int /*row*/ = 0) {
    F v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = static_cast<float>(sum.lane[i]);
    return v;
  }
  // The sums of the four bytes of each lane, added to `sum`.
  static Sum add_bytes(Vector x, Sum sum) {
    for (int i = 0; i < 4 * kLanes; ++i) sum.lane[i / 4] += x.byte[i];
    return sum;
  }
  static void store_sum(int32_t* p, Sum sum) { __builtin_memcpy(p, &sum, sizeof(sum)); }
  static void store(Word* p, Vector v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static F as_floats(Vector v) {
    F f;
    __builtin_memcpy(&f, &v, sizeof(f));
    return f;
  }
  static void store_bits(Word* p, F bits) { __builtin_memcpy(p, &bits, sizeof(bits)); }

  // Rounds the 64 values of a segment (int8_segment-inl.h), stores them and returns their unit. They are stored to be
  // broadcast, in memory order, or for lanes, in the order in which decode_row stores a row of W.
  template <Int8Order order>
  static float round(const F (&v)[kInt8Segment / kLanes], Word* out) {
    float x[kInt8Segment];
    for (int i = 0; i < kInt8Segment; ++i) x[i] = v[i / kLanes].lane[i % kLanes];
    int8_t rounded[kInt8Segment];
    const float unit = round_segment(x, rounded);
    int8_t* const bytes = reinterpret_cast<int8_t*>(out);
    for (int i = 0; i < kInt8Segment; ++i) bytes[order == Int8Order::kDecoded ? decoded(i) : i] = rounded[i];
    return unit;
  }

  // The fractions of a segment (int8_segment-inl.h), or zeros where it has none, in the order that round_products
  // takes. Returns the largest magnitude.
  static float round_to_fractions(const F (&v)[kInt8Segment / kLanes], int16_t* out) {
    uint32_t largest = 0;
    for (int i = 0; i < kInt8Segment; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, v[i / kLanes].lane[i % kLanes]) & kMagnitudeBits;
      largest = bits > largest ? bits : largest;
    }
    const float value = __builtin_bit_cast(float, largest);
    const float inverse = has_fractions(largest) ? kMostFraction / value : 0.0f;
    for (int i = 0; i < kInt8Segment; ++i) {
      const float x = v[i / kLanes].lane[i % kLanes];
      out[i] = inverse > 0.0f ? static_cast<int16_t>(__builtin_rintf(x * inverse)) : int16_t{0};
    }
    return value;
  }
  // Multiplies `count` segments of fractions, kInt8Segment apart, by those of scales, and rounds the products to be
  // broadcast: to words `stride` apart. `factors` may be written up to a multiple of kLanes.
  static void round_products(const int16_t* rows, const int16_t* scales, int64_t count, Word* out, int64_t stride,
                             float* factors) {
    const auto product = [](int32_t a, int32_t b) { return (a * b + 16384) >> 15; };
    for (int64_t t = 0; t < count; ++t, rows += kInt8Segment, out += stride) {
      int32_t largest = 0;
      for (int i = 0; i < kInt8Segment; ++i) {
        const int32_t p = product(rows[i], scales[i]);
        largest = p > largest ? p : -p > largest ? -p : largest;
      }
      const int32_t factor = largest < kLeastProduct ? 0 : kFactorOfOne / largest;
      int8_t bytes[kInt8Segment];
      for (int i = 0; i < kInt8Segment; ++i)
        bytes[i] = static_cast<int8_t>(product(product(rows[i], scales[i]), factor));
      __builtin_memcpy(out, bytes, sizeof(bytes));
      factors[t] = static_cast<float>(factor);
    }
  }

  // The integers of the codes, in the form from which weights are decoded: for decode_row, to be broadcast, or for
  // decode_lanes.
  struct Values {
    int8_t value[kCodes];
  };
  static Values values_of(const Int8CodeTable& codes, int added) {
    Values v;
    for (int i = 0; i < kCodes; ++i) v.value[i] = static_cast<int8_t>(codes.value[i] + added);
    return v;
  }
  // A segment of a row: of each 16 elements first those with even numbers, which are the high nibbles of 8 bytes.
  static void decode_row(const Values& values, const uint8_t* packed, Word* out) {
    int8_t* const bytes = reinterpret_cast<int8_t*>(out);
    for (int i = 0; i < kInt8Segment; ++i) bytes[decoded(i)] = values.value[code_at(packed, i)];
  }
  // 64 columns of four rows to words of lanes, in tiles of two vectors that lie `tile_stride` words apart, in the order
  // of WordInt::decode_lanes.
  static void decode_lanes(const Values& values, const uint8_t* const (&packed)[4], bool halves, Word* out,
                           int64_t tile_stride) {
    const int group = halves && 4 * kLanes > 32 ? 32 : 4 * kLanes;
    for (int column = 0; column < 64; ++column) {
      const int lane = column / group * group + column % 4 * (group / 4) + column % group / 4;
      int8_t* const word = reinterpret_cast<int8_t*>(out + lane / (2 * kLanes) * tile_stride + lane % (2 * kLanes));
      for (int row = 0; row < 4; ++row) word[row] = values.value[code_at(packed[row], column)];
    }
  }

 private:
  static constexpr int decoded(int element) { return element / 16 * 16 + element % 2 * 8 + element % 16 / 2; }
};

inline constexpr bool kHasBf16Words = false;
// Rows of a tile of outputs that is two vectors wide: its sums of int32 and of floats stay in registers.
inline constexpr int kInt8Height = 3;

// Runs run(word) with the word that is fastest for a weight's codes, where it has `blocks` blocks per segment.
template <class Run>
void with_int8_word(const Int8CodeTable&, int /*blocks*/, const Run& run) {
  run(WordInt8());
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
