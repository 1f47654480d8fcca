// NF4: the 4-bit NormalFloat code of QLoRA (Dettmers et al., 2023, appendix E), bit-compatible with bitsandbytes.
//
// Elements are taken in row-major order in blocks of `block_size`; element 2i is the high nibble of byte i, element
// 2i+1 the low one. A block's scale is absmax = max |w|. Everything here is exact IEEE float32: compile without
// fast-math and without contraction.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

inline constexpr int kCodes = 16;
inline constexpr int kZeroCode = 7;  // the code whose value is 0: an all-zero block, and the pad of an odd count

struct Nf4Table {
  float value[kCodes] = {-1.0f,
                         -0.6961928009986877f,
                         -0.5250730514526367f,
                         -0.39491748809814453f,
                         -0.28444138169288635f,
                         -0.18477343022823334f,
                         -0.09105003625154495f,
                         0.0f,
                         0.07958029955625534f,
                         0.16093020141124725f,
                         0.24611230194568634f,
                         0.33791524171829224f,
                         0.44070982933044434f,
                         0.5626170039176941f,
                         0.7229568362236023f,
                         1.0f};
  float boundary[kCodes - 1] = {};  // float32 midpoints of neighbouring values

  constexpr Nf4Table() {
    for (int i = 0; i + 1 < kCodes; ++i) boundary[i] = (value[i] + value[i + 1]) * 0.5f;
  }
};
inline constexpr Nf4Table kNf4{};

inline constexpr int64_t kMinBlockSize = 32;
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

// What a block's values are multiplied by before they are encoded. A NaN absmax stays NaN, so that every code of the
// block is 0 and every decoded value NaN.
QLORA_HD float inverse_absmax(float absmax) { return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax); }

// The same under a scale that was not taken from these values: doubly quantized, it may be below zero, which mirrors
// the codes, or nothing, under which only code 7 is right.
QLORA_HD float inverse_scale(float scale) {
  const bool is_nothing = scale < 1e-38f && scale > -1e-38f;
  return is_nothing ? 0.0f : 1.0f / scale;
}

// The number of boundaries below q: a tie goes to the lower code, NaN to code 0.
QLORA_INLINE int nf4_encode(float q) {
  int code = 0;
  for (int i = 0; i + 1 < kCodes; ++i) code += q > kNf4.boundary[i];
  return code;
}

// Code of element i of a packed buffer.
QLORA_HD int nf4_code_at(const uint8_t* packed, int64_t i) {
  const int byte = packed[i >> 1];
  return (i & 1) ? (byte & 15) : (byte >> 4);
}

}  // namespace qlora
