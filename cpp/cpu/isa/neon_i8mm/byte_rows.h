// The words of the vocabulary panel:: for weight rows side by side with SMMLA: those of NEON, and overloads that keep
// the eight bytes of a row together that a matrix has.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/neon/byte_rows.h"
#include "cpp/cpu/isa/neon/tables.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/unroll.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// Eight bytes each of rows 0 and 1, 2 and 3, 4 and 5, 6 and 7 are the registers of out[0] and out[1]; the next eight of
// each row are in out[2] and out[3].
[[gnu::always_inline]] inline void load_rows(const uint8_t* p, int64_t stride, F (&out)[kRowDwords]) {
  const auto load_row = [&](int64_t i) { return vreinterpretq_f64_u8(vld1q_u8(p + i * stride)); };
  const auto floats = [](float64x2_t x) { return vreinterpretq_f32_f64(x); };
  unroll<2>([&](auto i) {
    const float64x2_t a = load_row(4 * i), b = load_row(4 * i + 1), c = load_row(4 * i + 2), d = load_row(4 * i + 3);
    out[i] = {floats(vzip1q_f64(a, b)), floats(vzip1q_f64(c, d))};
    out[2 + i] = {floats(vzip2q_f64(a, b)), floats(vzip2q_f64(c, d))};
  });
}

[[gnu::always_inline]] inline void decode_eight(const MatrixInt8::Values& values, const F* packed,
                                                MatrixInt8::Vector& even, MatrixInt8::Vector& odd) {
  unroll<2>([&](auto i) {
    WordInt8::Vector of_even, of_odd;
    decode_eight(values, packed + i, of_even, of_odd);
    even.pair[2 * i] = of_even.low, even.pair[2 * i + 1] = of_even.high;
    odd.pair[2 * i] = of_odd.low, odd.pair[2 * i + 1] = of_odd.high;
  });
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
