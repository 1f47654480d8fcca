// The packing of codes. Elements are in row-major order, in blocks of `block_size` that share a scale.
//
// 4-bit codes: element 2i is the high nibble of byte i, and element 2i + 1 the low nibble. Bit-compatible with
// bitsandbytes. 8-bit codes are bytes.
//
// Codes of 5 and 6 bits are in units of kUnit elements. A unit holds a plane for each binary digit of the width
// (5 = 4 + 1, 6 = 4 + 2): first the low 4 bits of its codes, packed like 4-bit codes, and then their upper bits, where
// the element with the lower number has the lower bits of a byte:
//
// clang-format off
//   bytes of a unit   0 .. 15                          16 ..
//   5 bits            low 4 bits: [e0 e1] [e2 e3] ..   upper bit:    [e7 .. e0] [e15 .. e8] [e23 .. e16] [e31 .. e24]
//   6 bits            the same                         upper 2 bits: [e3 .. e0] [e7 .. e4] .. [e31 .. e28]
// clang-format on
//
// Rows consist of whole units, so they are as contiguous as those of bytes.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

inline constexpr int kCodes = 16;

inline constexpr int64_t kMinBlockSize = 16;
inline constexpr int64_t kMaxBlockSize = 4096;
inline constexpr int64_t kMaxNestedBlockSize = int64_t{1} << 20;
// The largest number of elements of a tensor. For empty tensors, the limit holds for the product of the nonzero sizes.
// It guarantees that the product of a size, an element's bytes and a tile does not wrap.
inline constexpr int64_t kMaxElements = int64_t{1} << 48;

QLORA_INLINE constexpr bool is_block_size(int64_t n) {
  return n >= kMinBlockSize && n <= kMaxBlockSize && (n & (n - 1)) == 0;
}
QLORA_INLINE constexpr bool is_nested_block_size(int64_t n) { return n >= 1 && n <= kMaxNestedBlockSize; }
// For positive b. The sum a + b, which could wrap, is never formed.
QLORA_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }
QLORA_INLINE constexpr int64_t packed_bytes(int64_t numel) { return ceil_div(numel, 2); }

// Returns the code of element i of a packed buffer.
QLORA_HD int code_at(const uint8_t* packed, int64_t i) {
  const int byte = packed[i >> 1];
  return (i & 1) ? (byte & 15) : (byte >> 4);
}

// The same for codes of any width. Counts of 5-bit and 6-bit codes are multiples of kUnit.
inline constexpr int kUnit = 32;
QLORA_HD constexpr bool has_units(int bits) { return bits == 5 || bits == 6; }
QLORA_HD constexpr int64_t unit_bytes(int bits) { return kUnit / 8 * bits; }
QLORA_INLINE constexpr int64_t packed_bytes(int64_t numel, int bits) {
  return bits == 4 ? packed_bytes(numel) : bits == 8 ? numel : numel / kUnit * unit_bytes(bits);
}
QLORA_HD int code_at(const uint8_t* packed, int64_t i, int bits) {
  if (bits == 4) return code_at(packed, i);
  if (bits == 8) return packed[i];
  const uint8_t* const unit = packed + i / kUnit * unit_bytes(bits);
  const int e = static_cast<int>(i % kUnit), low = code_at(unit, e);
  const uint8_t* const upper = unit + kUnit / 2;
  return bits == 5 ? low | (upper[e / 8] >> e % 8 & 1) << 4 : low | (upper[e / 4] >> 2 * (e % 4) & 3) << 4;
}

}  // namespace qlora
