// The NF4 values as numbers of 16 bits, for instructions that multiply pairs of such factors.
#pragma once

#include "cpp/format/nf4.h"

namespace qlora::cpu {

// 13-bit integers, for products summed exactly in int32: value ~ code / kIntCodes.per_one. No code is further off than
// 1.5e-4 of its value, where rounding a decoded weight may change it by 2.4e-4 (float16) or 3.9e-3 (bfloat16).
//
// Of the multipliers that keep eight products with 15-bit factors inside int32, the one that fits the 16 values best.
struct IntCodeTable {
  static constexpr int kLargest = 8191;
  int16_t value[kCodes] = {};
  double per_one = 0.0;

  constexpr IntCodeTable() {
    double best = 1e9;
    for (int i = 0; i < 3600; ++i) {
      const double multiplier = kLargest - 0.25 * i;
      const double error = squared_error(multiplier) / (multiplier * multiplier);
      if (error < best) best = error, per_one = multiplier;
    }
    for (int i = 0; i < kCodes; ++i) value[i] = static_cast<int16_t>(nearest(kNf4.value[i] * per_one));
  }

 private:
  static constexpr int nearest(double x) { return static_cast<int>(x < 0 ? x - 0.5 : x + 0.5); }
  static constexpr double squared_error(double multiplier) {
    double sum = 0.0;
    for (int i = 0; i < kCodes; ++i) {
      const double exact = kNf4.value[i] * multiplier, error = exact - nearest(exact);
      sum += error * error;
    }
    return sum;
  }
};
inline constexpr IntCodeTable kIntCodes{};

// bfloat16, for products summed in float32: value ~ code / kBf16Codes.per_one. The multiplier is a bfloat16 number, so
// that the codes of -1 and 1 are exact. Among those between 1 and 2, it minimizes the rounding errors of the 16 values.
// Their squared errors are a fifth of the average for rounded decoded weights, and none exceeds the maximum for those.
struct Bf16CodeTable {
  int16_t bits[kCodes] = {};
  double per_one = 0.0;

  constexpr Bf16CodeTable() {
    double best = 1e9;
    for (int i = 0; i < 128; ++i) {
      const double multiplier = 1.0 + i / 128.0;
      const double error = squared_error(multiplier) / (multiplier * multiplier);
      if (error < best) best = error, per_one = multiplier;
    }
    for (int i = 0; i < kCodes; ++i) bits[i] = nearest(kNf4.value[i] * per_one);
  }

 private:
  static constexpr int16_t nearest(double x) {
    const uint32_t u = __builtin_bit_cast(uint32_t, static_cast<float>(x));
    return static_cast<int16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  }
  static constexpr double squared_error(double multiplier) {
    double sum = 0.0;
    for (int i = 0; i < kCodes; ++i) {
      const double exact = kNf4.value[i] * multiplier;
      const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t>(nearest(exact))) << 16;
      const double error = exact - double{__builtin_bit_cast(float, bits)};
      sum += error * error;
    }
    return sum;
  }
};
inline constexpr Bf16CodeTable kBf16Codes{};

}  // namespace qlora::cpu
