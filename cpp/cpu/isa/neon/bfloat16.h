// Rounding to bfloat16 as from_float does it (cpp/format/dtypes.h), for every vocabulary of NEON.
#pragma once

#include <arm_neon.h>

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Each lane rounded to nearest even, as words. A NaN stays one, and becomes quiet.
inline uint16x8_t round_to_bfloat16(float32x4_t low, float32x4_t high) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
#else
  const auto bits_of = [](float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    return vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
  };
  return vuzp2q_u16(vreinterpretq_u16_u32(bits_of(low)), vreinterpretq_u16_u32(bits_of(high)));
#endif
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
