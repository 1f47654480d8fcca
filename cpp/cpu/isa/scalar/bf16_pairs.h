// stream::'s words for bfloat16 in pairs, in plain C++.
#pragma once

#include "cpp/cpu/isa/scalar/stream.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace stream {

inline constexpr int kMaxBf16Tokens = 4;  // at once (stream.h)

// The order of codes in which a lane sums its own weights.
using Bf16LaneOrder = LaneOrder;

// acc + a.low * b.low + a.high * b.high in each lane, of pairs that hold the bits of bfloat16. A set may take subnormal
// factors, products and sums for zero.
[[gnu::noinline]] inline Floats dot(const Floats& acc, const Pairs& a, const Pairs& b) {
  const auto low = [](int32_t pair) { return to_float(bfloat16{static_cast<uint16_t>(pair)}); };
  const auto high = [](int32_t pair) { return bits_float(static_cast<uint32_t>(pair) & 0xFFFF0000u); };
  return each_lane<Floats>(
      [&](int i) { return acc.lane[i] + low(a.lane[i]) * low(b.lane[i]) + high(a.lane[i]) * high(b.lane[i]); });
}
// The upper 16 bits of each lane, which are the bits of a bfloat16 stored as float32.
[[gnu::noinline]] inline Ints upper_halves(const Floats& x) {
  return each_lane<Ints>([&](int i) { return static_cast<int32_t>(float_bits(x.lane[i])) >> 16; });
}

}  // namespace stream
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
