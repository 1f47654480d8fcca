// The words of the vocabulary panel:: for weight rows side by side with NEON. scalar/byte_rows.h says what each name
// means.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/neon/tables.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

inline constexpr int kRowDwords = 4;
[[gnu::always_inline]] inline void load_rows(const void* p, int64_t stride, F (&out)[kRowDwords]) {
  const char* const row = static_cast<const char*>(p);
  const auto load_row = [&](int64_t i) { return vld1q_f32(reinterpret_cast<const float*>(row + i * stride)); };
  unroll<4>([&](auto i) { out[i] = {load_row(i), load_row(4 + i)}; });
  transpose4(out[0].low, out[1].low, out[2].low, out[3].low);
  transpose4(out[0].high, out[1].high, out[2].high, out[3].high);
}

[[gnu::always_inline]] inline void decode_eight(const WordInt8::Values& values, const F* packed, WordInt8::Vector& even,
                                                WordInt8::Vector& odd) {
  const uint8x16_t low = bytes_of(packed->low), high = bytes_of(packed->high);
  even = {vqtbl1q_s8(values, high_nibbles(low)), vqtbl1q_s8(values, high_nibbles(high))};
  odd = {vqtbl1q_s8(values, low_nibbles(low)), vqtbl1q_s8(values, low_nibbles(high))};
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
