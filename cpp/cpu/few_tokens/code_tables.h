// The NF4 values in 16 bits, for instructions that multiply pairs of such factors: as integers and as bfloat16.
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

// bfloat16, by its bits: value ~ code / kBf16Codes.per_one. Of the multipliers that leave 0, 1 and -1 exact this one
// fits the weights of a normal distribution best: they are 8.9e-4 off (root mean square, of the norm of the weights),
// where rounding each decoded weight makes it 1.65e-3. No code is further off than 1.9e-3 of its value.
struct Bf16CodeTable {
  static constexpr float per_one = 143.0f / 128;
  int16_t value[kCodes] = {};

  constexpr Bf16CodeTable() {
    for (int i = 0; i < kCodes; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, kNf4.value[i] * per_one);
      value[i] = static_cast<int16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
    }
  }
};
inline constexpr Bf16CodeTable kBf16Codes{};

}  // namespace qlora::cpu
