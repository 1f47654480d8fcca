// The names of codes: those of kCodeTables, and of a code that a caller has made up "0x" and the bits of its 16 float32
// values, eight hexadecimal digits each, code 0 first. And the names of what meets a weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "cpp/format/codes.h"
#include "cpp/format/custom_codes.h"
#include "cpp/format/problem.h"

namespace qlora {

// Reads the values of a name that begins with "0x". Returns false unless 128 hexadecimal digits follow.
inline bool values_of_name(const char* name, float (&values)[kCodes]) {
  constexpr size_t kDigits = 8;
  name += 2;
  if (std::strlen(name) != kCodes * kDigits || std::strspn(name, "0123456789abcdefABCDEF") != kCodes * kDigits)
    return false;
  for (float& value : values) {
    uint32_t bits = 0;
    for (size_t i = 0; i < kDigits; ++i) {
      const char digit = *name++;
      bits = bits << 4 | static_cast<uint32_t>(digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10);
    }
    std::memcpy(&value, &bits, sizeof value);
  }
  return true;
}

// Sets `code` to the code of that name and returns an empty text, or returns what is wrong with the name. Names of
// codes that exist for tests only are found, but not listed.
inline std::string find_code(const char* name, Code* code) {
  for (const CodeTable& t : kCodeTables) {
    if (std::strcmp(t.name, name) != 0) continue;
    *code = static_cast<Code>(&t - kCodeTables);
    return {};
  }
  for (const WideCode& t : kWideCodes) {
    if (std::strcmp(t.name, name) != 0) continue;
    *code = static_cast<Code>(kFirstWideCode + (&t - kWideCodes));
    return {};
  }
  float values[kCodes];
  if (std::strncmp(name, "0x", 2) != 0 || !values_of_name(name, values)) {
    std::string names;
    for (const CodeTable& t : kCodeTables)
      if (!t.is_test) names += std::string(t.name) + ", ";
    for (const WideCode& t : kWideCodes) names += std::string(t.name) + ", ";
    return "code: expected " + names + "or 0x and the 128 hexadecimal digits of 16 float32 values, got " + name;
  }
  float largest = 0.0f;
  for (const float value : values) {
    if (!(value - value == 0.0f)) return "code: expected 16 finite float32 values, got " + std::to_string(value);
    largest = std::max(largest, std::abs(value));
  }
  if (largest == 0.0f) return "code: expected a value other than 0, got 16 zeros";
  // Kernels multiply values by inputs before scales, and sum the products in float32.
  if (largest < 0x1p-60f || largest > 0x1p60f) {
    char text[96];
    std::snprintf(text, sizeof text, "code: expected values with a largest magnitude from 2^-60 to 2^60, got %g",
                  largest);
    return text;
  }
  if (!intern_code(values, code))
    return "code: expected at most " + std::to_string(kMaxCustomCodes) + " made-up codes in a process, got another";
  return {};
}

// Sets `activations` to what the name says and returns an empty text, or returns what is wrong with the name.
inline std::string find_activations(const char* name, Activations* activations) {
  constexpr const char* kNames[] = {"exact", "int8"};  // in the order of Activations
  for (int i = 0; i < 2; ++i) {
    if (std::strcmp(kNames[i], name) != 0) continue;
    *activations = static_cast<Activations>(i);
    return {};
  }
  return std::string("activations: expected exact or int8, got ") + name;
}

}  // namespace qlora
