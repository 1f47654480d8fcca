// Looks up 4-bit codes in registers, for every vocabulary of NEON. TBL looks up 16 bytes at once, so a table of 16
// values is stored as *planes*: plane p has byte p of every value. The bytes that were looked up are zipped to values
// again:
//
// clang-format off
//   codes              c0 c1 c2 ..                    16 bytes
//   plane p            p0 p1 p2 ..                    byte p of the value of each code
//   zip planes 0, 1    00 10 | 01 11 | 02 12 ..       8 words, low halves of the values
//   zip those of 0, 1 and of 2, 3                     4 float32
// clang-format on
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

inline uint8x16_t bytes_of(float32x4_t x) { return vreinterpretq_u8_f32(x); }
inline float32x4_t floats_of(uint16x8_t x) { return vreinterpretq_f32_u16(x); }

// The codes in the high and in the low nibbles of 16 bytes: elements 2i, and elements 2i + 1.
inline uint8x16_t high_nibbles(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }
inline uint8x16_t low_nibbles(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }

// 16 values of 16 bits.
struct WordTable {
  uint8x16_t plane[2];
};
inline WordTable word_table(uint16x8_t low, uint16x8_t high) {
  const uint8x16_t a = vreinterpretq_u8_u16(low), b = vreinterpretq_u8_u16(high);
  return {{vuzp1q_u8(a, b), vuzp2q_u8(a, b)}};
}
// The values of codes 0..7 and of codes 8..15.
struct Words {
  uint16x8_t low, high;
};
inline Words look_up(const WordTable& table, uint8x16_t codes) {
  const uint8x16_t b0 = vqtbl1q_u8(table.plane[0], codes), b1 = vqtbl1q_u8(table.plane[1], codes);
  return {vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), vreinterpretq_u16_u8(vzip2q_u8(b0, b1))};
}

// 16 float32.
struct FloatTable {
  WordTable low, high;  // halves of the values
};
inline FloatTable float_table(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
  const auto word = [](float32x4_t x) { return vreinterpretq_u16_f32(x); };
  return {word_table(vuzp1q_u16(word(a), word(b)), vuzp1q_u16(word(c), word(d))),
          word_table(vuzp2q_u16(word(a), word(b)), vuzp2q_u16(word(c), word(d)))};
}
inline FloatTable float_table(const float* value) {
  return float_table(vld1q_f32(value), vld1q_f32(value + 4), vld1q_f32(value + 8), vld1q_f32(value + 12));
}
// The values of codes 4q .. 4q + 3 in vector q.
struct SixteenFloats {
  float32x4_t q[4];
};
inline SixteenFloats look_up(const FloatTable& table, uint8x16_t codes) {
  const Words low = look_up(table.low, codes), high = look_up(table.high, codes);
  return {{floats_of(vzip1q_u16(low.low, high.low)), floats_of(vzip2q_u16(low.low, high.low)),
           floats_of(vzip1q_u16(low.high, high.high)), floats_of(vzip2q_u16(low.high, high.high))}};
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
