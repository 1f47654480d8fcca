// How activations are rounded to int8: the numbers of a segment are rounded to multiples of their unit, a 127th of the
// largest. dy · scale is the product of two numbers that are rounded before, to fractions.
#pragma once

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Segments whose largest magnitude is 0 or in this range need none of the care below: neither 1 / unit nor unit is
// subnormal or infinite. Magnitudes are compared by their bits, which have the order of the numbers.
inline constexpr uint32_t kLeastPlainBits = power_of_two_bits(-100);
inline constexpr bool is_plain_segment(uint32_t largest_bits) {
  return largest_bits - kLeastPlainBits < kInfinityBits - kLeastPlainBits || largest_bits == 0;
}
inline constexpr float kInt8Largest = 127.0f;
inline constexpr float inverse_unit(float largest) { return largest > 0.0f ? kInt8Largest / largest : 0.0f; }
inline constexpr int kSegmentWords = kInt8Segment / 4;  // of four int8

inline int blocks_per_segment(const Weight& w) {
  return static_cast<int>(w.scales.block_size < kInt8Segment ? kInt8Segment / w.scales.block_size : 1);
}

// The order of a segment's bytes: that of memory, or that in which the codes of a weight row are decoded, where of each
// 16 elements the even ones, which are the high nibbles of 8 bytes, come first.
enum class Int8Order { kMemory, kDecoded };

// Rounds a segment and returns its unit. An infinite number is 1 or -1 infinite unit beside which finite ones are 0,
// and NaN makes the unit NaN.
inline float round_segment(const float* x, int8_t* out) {
  uint32_t bits[kInt8Segment], largest = 0;
  __builtin_memcpy(bits, x, sizeof(bits));
  for (const uint32_t b : bits) largest = (b & kMagnitudeBits) > largest ? b & kMagnitudeBits : largest;
  if (largest >= kInfinityBits) {
    for (int i = 0; i < kInt8Segment; ++i) {
      const bool is_infinite = (bits[i] & kMagnitudeBits) == kInfinityBits;
      out[i] = static_cast<int8_t>(is_infinite ? (bits[i] > kMagnitudeBits ? -1 : 1) : 0);
    }
  } else {
    const float factor = largest < kLeastPlainBits ? 0x1p60f : 1.0f;
    const float scaled = __builtin_bit_cast(float, largest) * factor;
    const float inverse = inverse_unit(scaled);
    for (int i = 0; i < kInt8Segment; ++i) out[i] = static_cast<int8_t>(__builtin_rintf(x[i] * factor * inverse));
    return scaled / kInt8Largest / factor;
  }
  return __builtin_bit_cast(float, largest);
}

// Fractions of a segment are int16: multiples of a 32767th of the largest magnitude. The fractions of dy and those of
// the scales are made once, and their product is that of two int16:
//
//   product = round(dy · scale / 32768)                      of fractions, in -32767 .. 32767
//   factor  = 127 · 32768 / largest |product|, truncated     of a segment
//   int8    = round(product · factor / 32768)
//
// where halves are rounded up. Products are known to one and a half, so where the largest is below 4096 they would be
// too coarse for 127 units of it: then, and where 32767 / largest or the units might be subnormal or infinite, the
// factor is 0, and dy · scale is multiplied and rounded in float32 (round_segment).
inline constexpr float kMostFraction = 32767.0f;
inline constexpr int32_t kLeastProduct = 4096, kFactorOfOne = 127 * 32768;
inline constexpr uint32_t kLeastFractionBits = power_of_two_bits(-48), kMostFractionBits = power_of_two_bits(62);
inline constexpr bool has_fractions(uint32_t largest_bits) {
  return largest_bits - kLeastFractionBits <= kMostFractionBits - kLeastFractionBits;
}
// The unit of a segment is the largest of dy times the largest of the scales times this, divided by the factor.
inline constexpr float kUnitOfFractions = static_cast<float>(32768.0 * 32768.0 / (32767.0 * 32767.0));

// Where a word of a row lies in a broadcast panel with `stride` words per row, of which `rows` alternate after as many
// words (many_tokens/multiply_int8-inl.h).
template <int rows>
constexpr int64_t in_broadcast(int64_t row, int64_t word, int64_t stride) {
  return row / rows * rows * stride + (row % rows + word) * rows;
}
// Moves the words of a segment to a panel in which each `some` of them lie `apart` words from the next ones.
template <int some>
inline void spread(const int32_t* words, int32_t* panel, int64_t apart) {
  for (int i = 0; i < kSegmentWords; i += some, panel += apart) __builtin_memcpy(panel, words + i, 4 * some);
}

// The unit of the `words` words of a segment that meet a block of W. Beside an infinity in another block, what is
// finite counts as 0, and 0 times an infinite unit would be NaN.
inline float unit_of_block(float unit, const int32_t* words, int count) {
  if (unit != __builtin_inff()) [[likely]]
    return unit;
  for (int i = 0; i < count; ++i)
    if (words[i] != 0) return unit;
  return 0.0f;
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
