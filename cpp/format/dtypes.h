// The element types of the operators, and scalar conversions between them, which round to nearest even and preserve NaN
// and subnormals.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpp/format/portable.h"

namespace qlora {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

QLORA_INLINE constexpr int64_t dtype_bytes(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

QLORA_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
QLORA_INLINE float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

QLORA_INLINE float to_float(bfloat16 x) { return bits_float(uint32_t{x.bits} << 16); }
QLORA_INLINE float to_float(float x) { return x; }
QLORA_INLINE float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u;
  if (exponent == 31) return bits_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24: a subnormal, exact
  return sign ? -magnitude : magnitude;
}

QLORA_INLINE void from_float(float x, float* out) { *out = x; }
QLORA_INLINE void from_float(float x, bfloat16* out) {
  const uint32_t u = float_bits(x);
  out->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
QLORA_INLINE void from_float(float x, float16* out) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  uint32_t h;
  if (magnitude > 0x7F800000u) {
    h = 0x7E00u | ((magnitude >> 13) & 0x3FFu);  // a quiet NaN with the same payload
  } else if (magnitude >= 0x477FF000u) {         // 65520 and above round to infinity
    h = 0x7C00u;
  } else if (magnitude >= 0x38800000u) {  // normal: 2^-14 and above
    h = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    h = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  }
  out->bits = static_cast<uint16_t>(sign | h);
}

}  // namespace qlora
