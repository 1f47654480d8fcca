// Minimum, maximum and rounding, for code that must not include the standard library.
#pragma once

#include <cstdint>

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

// The bits of a T's significand after the leading one.
template <class T>
inline constexpr int kMantissaBits = 23;
template <>
inline constexpr int kMantissaBits<bfloat16> = 7;
template <>
inline constexpr int kMantissaBits<float16> = 10;

template <class T>
inline float rounded(float x) {
  T out;
  from_float(x, &out);
  return to_float(out);
}

// The bits of non-negative floats have the order of the numbers, and those of a NaN are above infinity's.
inline constexpr uint32_t kInfinityBits = 0x7F800000u;
inline constexpr uint32_t kMagnitudeBits = 0x7FFFFFFFu;
constexpr uint32_t power_of_two_bits(int exponent) { return static_cast<uint32_t>(127 + exponent) << 23; }

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
