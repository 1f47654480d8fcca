// The values of a code as 16-bit and 8-bit numbers, for instructions that multiply several of them, and which of its
// codes are large.
#pragma once

#include "cpp/format/codes.h"

namespace qlora {

QLORA_INLINE constexpr int nearest_integer(double x) { return static_cast<int>(x < 0 ? x - 0.5 : x + 0.5); }

// The least power of two by which all values of a table become integers of magnitudes up to `most`, or 0.
QLORA_INLINE constexpr double power_for_integers(const CodeTable& table, int most) {
  double power = 1.0;
  while (table.largest * power >= 2.0) power /= 2.0;
  while (table.largest * power < 1.0) power *= 2.0;
  for (; table.largest * power <= most; power *= 2.0) {
    bool exact = true;
    for (const float x : table.value) exact &= x * power == nearest_integer(x * power);
    if (exact) return power;
  }
  return 0.0;
}

// 13-bit integers, for products summed exactly in int32: value ~ integer / per_one. Integers serve a code if each is
// within 1.5e-4 of its value. Rounding a decoded weight may change it by 2.4e-4 (float16) or 3.9e-3 (bfloat16).
//
// per_one is the least power of two that makes all values integers. Then they are exact, and so are conversions of
// small sums to float32. If there is none, it is the multiplier that fits the 16 values best, among those that keep
// eight products with 15-bit factors inside int32.
struct IntCodeTable {
  static constexpr int kLargest = 8191;
  using Value = int16_t;
  Value value[kCodes] = {};
  double per_one = 0.0;
  bool serves = false;
  bool exact = false;

  constexpr IntCodeTable() = default;
  explicit constexpr IntCodeTable(const CodeTable& table) {
    per_one = power_for_integers(table, kLargest);
    exact = per_one != 0.0;
    if (!exact) per_one = best_multiplier(table) / table.largest;
    serves = true;
    for (int i = 0; i < kCodes; ++i) {
      const double value_in_ones = table.value[i] * per_one, error = value_in_ones - nearest_integer(value_in_ones);
      value[i] = static_cast<int16_t>(nearest_integer(value_in_ones));
      serves &= magnitude(error) <= 1.5e-4 * magnitude(value_in_ones);
    }
  }

 private:
  // The compiler evaluates this in every file that includes it. To compile fast, it makes no calls, and it drops a
  // candidate as soon as its growing sum reaches the best one.
  static constexpr double best_multiplier(const CodeTable& table) {
    double unit[kCodes] = {}, best = 1e9, multiplier = 0.0;
    for (int code = 0; code < kCodes; ++code) unit[code] = table.value[code] / double{table.largest};
    for (int i = 0; i < 3600; ++i) {
      const double candidate = kLargest - 0.25 * i;
      double sum = 0.0, error = 0.0;
      for (int code = 0; code < kCodes && error < best; ++code) {
        const double exact = unit[code] * candidate;
        const double rounding = exact - static_cast<int>(exact < 0 ? exact - 0.5 : exact + 0.5);
        sum += rounding * rounding;
        error = sum / (candidate * candidate);
      }
      if (error < best) best = error, multiplier = candidate;
    }
    return multiplier;
  }
  static constexpr double magnitude(double x) { return x < 0 ? -x : x; }
};
inline constexpr PerCode<IntCodeTable> kIntCodes;
static_assert(kIntCodes[Code::kNf4].serves);
static_assert(kIntCodes[Code::kE2m1].exact && kIntCodes[Code::kInt4].exact && kIntCodes[Code::kUint4].exact &&
              kIntCodes[Code::kIq4Nl].exact);
QLORA_EXPORT const IntCodeTable& custom_int_codes(Code code);
QLORA_INLINE constexpr const IntCodeTable& int_codes(Code code) {
  return is_custom(code) ? custom_int_codes(code) : kIntCodes[code];
}

// 8-bit integers, for products with x rounded to int8: value ~ integer / per_one. Where a power of two makes all values
// integers they are exact. Otherwise per_one is the multiplier that fits the 16 values best, among those that change no
// value by more than 1/254 of the largest, as rounding to 127ths may.
struct Int8CodeTable {
  static constexpr int kLargest = 127;
  using Value = int8_t;
  Value value[kCodes] = {};
  double per_one = 0.0;
  bool exact = false;
  int8_t least = 0, most = 0;  // of the integers

  constexpr Int8CodeTable() = default;
  explicit constexpr Int8CodeTable(const CodeTable& table) {
    per_one = power_for_integers(table, kLargest);
    exact = per_one != 0.0;
    if (!exact) per_one = best_multiplier(table) / table.largest;
    for (int i = 0; i < kCodes; ++i) {
      value[i] = static_cast<int8_t>(nearest_integer(table.value[i] * per_one));
      least = value[i] < least ? value[i] : least;
      most = value[i] > most ? value[i] : most;
    }
  }

 private:
  static constexpr double best_multiplier(const CodeTable& table) {
    double best = 1e9, multiplier = kLargest;
    for (int i = 0; i <= 126; ++i) {
      const double candidate = kLargest - 0.5 * i;
      double sum = 0.0, most = 0.0;
      for (const float value : table.value) {
        const double exact = value / double{table.largest} * candidate, rounding = exact - nearest_integer(exact);
        const double size = rounding < 0 ? -rounding : rounding;
        sum += rounding * rounding, most = size > most ? size : most;
      }
      if (most / candidate > 0.5 / kLargest * (1 + 1e-9)) continue;
      if (sum / (candidate * candidate) < best) best = sum / (candidate * candidate), multiplier = candidate;
    }
    return multiplier;
  }
};
inline constexpr PerCode<Int8CodeTable> kInt8Codes;
static_assert(kInt8Codes[Code::kE2m1].exact && kInt8Codes[Code::kInt4].exact && kInt8Codes[Code::kUint4].exact &&
              kInt8Codes[Code::kIq4Nl].exact);
const Int8CodeTable& custom_int8_codes(Code code);
QLORA_INLINE constexpr const Int8CodeTable& int8_codes(Code code) {
  return is_custom(code) ? custom_int8_codes(code) : kInt8Codes[code];
}

// bfloat16, for products summed in float32: value ~ number / per_one. The multiplier of the values, in units of the
// largest, is itself a bfloat16 number, so that -1 and 1 are exact. Among those between 1 and 2, it minimizes the
// rounding errors of the 16 values. For NF4, the mean square error is a fifth of that of rounded decoded weights, and
// no error is larger than theirs can be.
struct Bf16CodeTable {
  int16_t bits[kCodes] = {};
  double per_one = 0.0;

  constexpr Bf16CodeTable() = default;
  explicit constexpr Bf16CodeTable(const CodeTable& table) {
    double best = 1e9, multiplier = 0.0;
    for (int i = 0; i < 128; ++i) {
      const double candidate = 1.0 + i / 128.0;
      const double error = squared_error(table, candidate) / (candidate * candidate);
      if (error < best) best = error, multiplier = candidate;
    }
    per_one = multiplier / table.largest;
    for (int i = 0; i < kCodes; ++i) bits[i] = nearest(table.value[i] * per_one);
  }

 private:
  static constexpr int16_t nearest(double x) {
    const uint32_t u = __builtin_bit_cast(uint32_t, static_cast<float>(x));
    return static_cast<int16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  }
  static constexpr double squared_error(const CodeTable& table, double multiplier) {
    double sum = 0.0;
    for (int i = 0; i < kCodes; ++i) {
      const double exact = table.value[i] / double{table.largest} * multiplier;
      const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t>(nearest(exact))) << 16;
      const double error = exact - double{__builtin_bit_cast(float, bits)};
      sum += error * error;
    }
    return sum;
  }
};
inline constexpr PerCode<Bf16CodeTable> kBf16Codes;
const Bf16CodeTable& custom_bf16_codes(Code code);
QLORA_INLINE constexpr const Bf16CodeTable& bf16_codes(Code code) {
  return is_custom(code) ? custom_bf16_codes(code) : kBf16Codes[code];
}

// The codes whose values are at least kLeast of the largest, which the search for concentrated rows and columns counts
// (cpp/cpu/verdict/rows-inl.h). If fewer codes were large, a chunk in a block with a large scale would hold
// too few of them to prove anything. At this bound, first chunks suffice for nine tiles in ten of normally distributed
// weights in NF4.
struct LargeCodes {
  static constexpr float kLeast = 0.27f;
  uint8_t is_large[kCodes] = {};  // 0xFF for a large code
  float least = 0.0f;             // the least of their magnitudes, in units of the largest value

  constexpr LargeCodes() = default;
  explicit constexpr LargeCodes(const CodeTable& table) {
    for (int code = 0; code < kCodes; ++code) {
      const float magnitude = table.value[code] < 0 ? -table.value[code] : table.value[code];
      if (magnitude == 0.0f || magnitude < kLeast * table.largest) continue;
      is_large[code] = 0xFF;
      const float size = magnitude / table.largest;
      if (least == 0.0f || size < least) least = size;
    }
  }
};
inline constexpr PerCode<LargeCodes> kLargeCodes;
const LargeCodes& custom_large_codes(Code code);
QLORA_INLINE constexpr const LargeCodes& large_codes(Code code) {
  return is_custom(code) ? custom_large_codes(code) : kLargeCodes[code];
}

}  // namespace qlora
