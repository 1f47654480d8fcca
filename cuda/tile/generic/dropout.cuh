// The dropout mask of consecutive elements.
#pragma once

#include <cstdint>

#include "cpp/format/philox.h"

namespace qlora::tile {

// Bit j is set if element index + j is kept, for j < kCount. kCount is a multiple of 4.
template <int kCount = 8>
__device__ __forceinline__ uint32_t keep_mask(const Dropout& dropout, int64_t index) {
  const int phase = static_cast<int>(index & 3);
  uint32_t mask = 0;
  const int groups = kCount / 4 + (phase == 0 ? 0 : 1);
#pragma unroll 1
  for (int i = 0; i < groups; ++i) {
    const Philox4 random = philox4x32_10(dropout.key(), static_cast<uint64_t>(index >> 2) + i);
    uint32_t four = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) four |= static_cast<uint32_t>(dropout.keeps(random.lane[j])) << j;
    mask |= four << (4 * i);
  }
  return mask >> phase & ((1u << kCount) - 1);
}

// Zeroes those of eight 16-bit elements whose bit in `mask` is 0.
__device__ __forceinline__ uint4 keep_8(uint4 v, uint32_t mask) {
  const auto pair = [mask](uint32_t two, int i) {
    return two & ((mask >> (2 * i) & 1 ? 0x0000FFFFu : 0u) | (mask >> (2 * i + 1) & 1 ? 0xFFFF0000u : 0u));
  };
  return make_uint4(pair(v.x, 0), pair(v.y, 1), pair(v.z, 2), pair(v.w, 3));
}

}  // namespace qlora::tile
