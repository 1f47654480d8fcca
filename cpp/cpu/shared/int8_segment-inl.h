// How activations are rounded to int8: the numbers of a segment are rounded to multiples of their unit, a 127th of the
// largest.
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
