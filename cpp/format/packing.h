// The packing of 4-bit codes. Elements are in row-major order, in blocks of `block_size` that share a scale. Element 2i
// is the high nibble of byte i, and element 2i + 1 the low nibble. Bit-compatible with bitsandbytes.
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

}  // namespace qlora
