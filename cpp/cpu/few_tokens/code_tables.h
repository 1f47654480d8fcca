// The NF4 values as integers of 16 bits, for instructions that multiply pairs of such factors.
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

}  // namespace qlora::cpu
