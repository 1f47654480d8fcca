// stream::'s words for bfloat16 in pairs, for BFDOT. scalar/bf16_pairs.h says what each name means.
#pragma once

#include "cpp/cpu/isa/neon_bf16/stream.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

inline constexpr int kMaxBf16Tokens = 6;

// BFDOT sums neighbouring elements.
struct Bf16LaneOrder {
  static uint8x16_t bytes(uint8x16_t lanes) {
    static constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
    return vqtbl1q_u8(lanes, vld1q_u8(kOrder));
  }
  static constexpr int weight(int s, int i) { return weight_of_byte(s, 4 * (i / 2) + (s & 2) + i % 2); }
};

inline Floats dot(Floats acc, Pairs a, Pairs b) {
  const auto add = [](float32x4_t sum, int16x8_t x, int16x8_t y) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_s16(x), vreinterpretq_bf16_s16(y));
  };
  return {add(acc.low, a.low, b.low), add(acc.high, a.high, b.high)};
}
inline Ints upper_halves(Floats x) {
  return {vshrq_n_s32(vreinterpretq_s32_f32(x.low), 16), vshrq_n_s32(vreinterpretq_s32_f32(x.high), 16)};
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
