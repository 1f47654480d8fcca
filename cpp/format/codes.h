// The values of codes: a weight is value[code] * scale. Everything here is exact IEEE float32, so compile it
// without fast-math and without contraction.
#pragma once

#include <cstdint>

#include "cpp/format/packing.h"
#include "cpp/format/portable.h"

namespace qlora {

// A code's 16 values, in any order and of any magnitude, and the tables that encoding and the kernels derive from them.
//
// Encoding uses the distinct values in ascending order. A value's position in this order is its *rank*. If several
// codes have the same value (+0 and -0, for example), encoding uses the lowest of them.
//
// clang-format off
//   value, by code                3.0  -1.0   0.0   1.0   0.0 ..
//   ranked                       -1.0   0.0   1.0   3.0   infinity
//   boundary                        -0.5   0.5   2.0   infinity       midpoints of neighbours, rounded to float32
//   code_of_rank                  1     2     3     0     (nothing)
// clang-format on
struct CodeTable {
  const char* name = "";
  bool is_test = false;  // exists for tests only, and is not listed
  float value[kCodes] = {};

  int ranks = 0;              // distinct values
  float ranked[kCodes] = {};  // by rank
  uint8_t code_of_rank[kCodes] = {};
  float boundary[kCodes - 1] = {};
  float gap[kCodes - 1] = {};  // from a ranked value to the next one, or infinity after the last
  float largest = 0.0f;        // the largest |value|: a block's scale is its largest magnitude divided by this
  float smallest = 0.0f;       // the smallest |value| except 0
  bool is_ascending = false;   // codes equal ranks
  uint8_t zero_code = 0;       // the code of 0, which also pads an odd number of codes

  constexpr CodeTable() = default;
  constexpr CodeTable(const char* name_, bool is_test_, const float (&value_)[kCodes])
      : name(name_), is_test(is_test_) {
    for (int code = 0; code < kCodes; ++code) value[code] = value_[code];
    rank();
    for (int i = ranks; i < kCodes; ++i) ranked[i] = __builtin_inff();
    for (int i = 0; i + 1 < kCodes; ++i) {
      const bool is_last = i + 1 >= ranks;
      boundary[i] = is_last ? __builtin_inff() : (ranked[i] + ranked[i + 1]) * 0.5f;
      gap[i] = is_last ? __builtin_inff() : ranked[i + 1] - ranked[i];
    }
    for (const float x : value) {
      const float magnitude = x < 0 ? -x : x;
      if (magnitude > largest) largest = magnitude;
      if (magnitude > 0 && (smallest == 0 || magnitude < smallest)) smallest = magnitude;
    }
    is_ascending = ranks == kCodes;
    for (int i = 0; i < ranks; ++i) is_ascending &= code_of_rank[i] == i;
    int zero_rank = 0;
    for (const float b : boundary) zero_rank += 0.0f > b;
    zero_code = code_of_rank[zero_rank];
  }

  // Two codes of the least value in one byte. A block whose scale is NaN consists of them.
  constexpr uint8_t nan_byte() const { return static_cast<uint8_t>(code_of_rank[0] * 17); }

 private:
  constexpr void rank() {
    for (int code = 0; code < kCodes; ++code) {
      int at = 0;
      while (at < ranks && ranked[at] < value[code]) ++at;
      if (at < ranks && ranked[at] == value[code]) continue;
      for (int i = ranks; i > at; --i) ranked[i] = ranked[i - 1], code_of_rank[i] = code_of_rank[i - 1];
      ranked[at] = value[code];
      code_of_rank[at] = static_cast<uint8_t>(code);
      ++ranks;
    }
  }
};

enum class Code : int { kNf4, kFp4, kE2m1, kInt4, kUint4, kIq4Nl, kShuffled };

inline constexpr CodeTable kCodeTables[] = {
    // 4-bit NormalFloat (Dettmers et al., "QLoRA", 2023, appendix E), with the values of bitsandbytes.
    {"nf4",
     false,
     {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
      1.0f}},
    // bitsandbytes' FP4: its codes are not in the order of their values, and both zeros are positive.
    {"fp4",
     false,
     {0.0f, 0.0052083333333333333f, 0.66666666666666667f, 1.0f, 0.33333333333333333f, 0.5f, 0.16666666666666667f, 0.25f,
      0.0f, -0.0052083333333333333f, -0.66666666666666667f, -1.0f, -0.33333333333333333f, -0.5f, -0.16666666666666667f,
      -0.25f}},
    // The elements of MXFP4 and NVFP4 (OCP Microscaling Formats specification 1.0, section 5.3.3).
    {"e2m1",
     false,
     {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f}},
    // Integers: with a zero point at code 8, and without one for formats that store an offset per block.
    {"int4",
     false,
     {-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f, 0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f}},
    {"uint4",
     false,
     {0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f, 8.0f, 9.0f, 10.0f, 11.0f, 12.0f, 13.0f, 14.0f, 15.0f}},
    // GGUF's IQ4_NL.
    {"iq4_nl",
     false,
     {-127.0f, -104.0f, -83.0f, -65.0f, -49.0f, -35.0f, -22.0f, -10.0f, 1.0f, 13.0f, 25.0f, 38.0f, 53.0f, 69.0f, 89.0f,
      113.0f}},
    {"shuffled",
     true,
     {0.75f, -2.5f, 0.0f, 3.0f, -0.25f, 1.5f, -1.0f, 2.0f, -0.5f, 0.25f, -1.75f, 2.5f, 1.0f, -0.0f, 0.5f, -1.25f}},
};
inline constexpr int kCodeTableCount = sizeof(kCodeTables) / sizeof(kCodeTables[0]);

// Whether each value is the previous one plus 1.
QLORA_HD constexpr bool is_consecutive(Code code) { return code == Code::kInt4 || code == Code::kUint4; }

// Wide codes have more than 4 bits. Their values are computed, not looked up: they are integers counted from `zero`, or
// small floating-point numbers. Kernels read them with one reader per device, which knows these fields and no names.
struct WideCode {
  enum class Kind : int { kInteger, kE4m3, kE5m2 };
  const char* name;
  int bits;
  Kind kind;
  int zero;  // the code of 0
};
inline constexpr WideCode kWideCodes[] = {
    {"int5", 5, WideCode::Kind::kInteger, 16},
    {"uint5", 5, WideCode::Kind::kInteger, 0},
    {"int6", 6, WideCode::Kind::kInteger, 32},
    {"uint6", 6, WideCode::Kind::kInteger, 0},
    {"int8", 8, WideCode::Kind::kInteger, 128},
    {"uint8", 8, WideCode::Kind::kInteger, 0},
    // OCP 8-bit floating point specification 1.0: E4M3 has NaN but no infinity, E5M2 both.
    {"e4m3", 8, WideCode::Kind::kE4m3, 0},
    {"e5m2", 8, WideCode::Kind::kE5m2, 0},
};
inline constexpr int kWideCodeCount = sizeof(kWideCodes) / sizeof(kWideCodes[0]);
// Wide code i is the number kFirstWideCode + i.
inline constexpr int kFirstWideCode = 1 << 16;
QLORA_HD constexpr bool is_wide(Code code) { return static_cast<int>(code) >= kFirstWideCode; }
QLORA_INLINE constexpr const WideCode& wide_code(Code code) {
  return kWideCodes[static_cast<int>(code) - kFirstWideCode];
}
QLORA_INLINE constexpr int bits_of(Code code) { return is_wide(code) ? wide_code(code).bits : 4; }

QLORA_HD float wide_value(WideCode::Kind kind, int zero, int code) {
  if (kind == WideCode::Kind::kInteger) return static_cast<float>(code - zero);
  const bool is_e4m3 = kind == WideCode::Kind::kE4m3;
  const int mantissa_bits = is_e4m3 ? 3 : 2, bias = is_e4m3 ? 7 : 15, magnitude = code & 127;
  const int exponent = magnitude >> mantissa_bits, mantissa = magnitude & ((1 << mantissa_bits) - 1);
  float value = 0.0f;
  if (is_e4m3 ? magnitude == 127 : exponent == 31) {
    value = is_e4m3 || mantissa ? __builtin_nanf("") : __builtin_inff();
  } else {
    value = static_cast<float>(exponent ? mantissa | 1 << mantissa_bits : mantissa);
    // Times 2^(exponent - bias - mantissa_bits), an exponent that float32 has.
    const uint32_t power = static_cast<uint32_t>((exponent ? exponent : 1) - bias - mantissa_bits + 127) << 23;
    float factor = 0.0f;
    __builtin_memcpy(&factor, &power, sizeof factor);
    value *= factor;
  }
  return code & 128 ? -value : value;
}
QLORA_INLINE float wide_value(const WideCode& wide, int code) { return wide_value(wide.kind, wide.zero, code); }

// A code that a caller has made up is a number from kCodeTableCount on. The kernels' library keeps its table, forever
// (cpp/format/custom_codes.h). The numbers of wide codes are beyond those.
QLORA_INLINE constexpr bool is_custom(Code code) { return static_cast<int>(code) >= kCodeTableCount; }
QLORA_EXPORT const CodeTable& custom_table(Code code);

// Of a code of 4 bits, which the caller has made sure of.
QLORA_INLINE constexpr const CodeTable& table_of(Code code) {
  return is_custom(code) ? custom_table(code) : kCodeTables[static_cast<int>(code)];
}

// The largest magnitude of a code's finite values.
QLORA_INLINE constexpr float largest_value(Code code) {
  if (!is_wide(code)) return table_of(code).largest;
  const WideCode& wide = wide_code(code);
  if (wide.kind == WideCode::Kind::kE4m3) return 448.0f;
  if (wide.kind == WideCode::Kind::kE5m2) return 57344.0f;
  return static_cast<float>(wide.zero ? wide.zero : (1 << wide.bits) - 1);
}

// A T per code of kCodeTables, constructed from its table at compile time.
template <class T>
struct PerCode {
  T of[kCodeTableCount] = {};

  constexpr PerCode() {
    for (int i = 0; i < kCodeTableCount; ++i) of[i] = T(kCodeTables[i]);
  }
  constexpr const T& operator[](Code code) const { return of[static_cast<int>(code)]; }
};

// The scale of a block whose largest magnitude is `absmax`.
QLORA_HD float scale_of(float absmax, float largest_value) {
  return largest_value == 1.0f ? absmax : absmax / largest_value;
}

// The factor for a block's values before they are encoded. A NaN scale stays NaN, so every code of the block is the
// code of the least value, and every decoded value is NaN.
QLORA_HD float inverse_absmax(float scale) { return 1.0f / (scale < 1e-38f ? 1e-38f : scale); }

// The same for a scale that was not computed from these values. A nested scale may be negative, which mirrors the
// codes, or zero, for which only the code of 0 is right.
QLORA_HD float inverse_scale(float scale) {
  const bool is_nothing = scale < 1e-38f && scale > -1e-38f;
  return is_nothing ? 0.0f : 1.0f / scale;
}

// Returns the number of boundaries below q: a tie goes to the lower rank, NaN to rank 0.
QLORA_INLINE int rank_of(const CodeTable& table, float q) {
  int rank = 0;
  for (int i = 0; i + 1 < kCodes; ++i) rank += q > table.boundary[i];
  return rank;
}

}  // namespace qlora
