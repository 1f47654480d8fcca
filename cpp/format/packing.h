// How 4-bit codes are packed: elements in row-major order in blocks of `block_size` that share a scale; element 2i is
// the high nibble of byte i, element 2i + 1 the low one. Bit-compatible with bitsandbytes.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

inline constexpr int kCodes = 16;

inline constexpr int64_t kMinBlockSize = 16;
inline constexpr int64_t kMaxBlockSize = 4096;
inline constexpr int64_t kMaxNestedBlockSize = int64_t{1} << 20;
// What a tensor may count, the sizes of an empty one included: no product of a size, an element's bytes and a tile
// wraps.
inline constexpr int64_t kMaxElements = int64_t{1} << 48;

QLORA_INLINE constexpr bool is_block_size(int64_t n) {
  return n >= kMinBlockSize && n <= kMaxBlockSize && (n & (n - 1)) == 0;
}
QLORA_INLINE constexpr bool is_nested_block_size(int64_t n) { return n >= 1 && n <= kMaxNestedBlockSize; }
// For a positive b. The sum of both, which may wrap, is never formed.
QLORA_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }
QLORA_INLINE constexpr int64_t packed_bytes(int64_t numel) { return ceil_div(numel, 2); }

// Code of element i of a packed buffer.
QLORA_HD int code_at(const uint8_t* packed, int64_t i) {
  const int byte = packed[i >> 1];
  return (i & 1) ? (byte & 15) : (byte >> 4);
}

}  // namespace qlora
