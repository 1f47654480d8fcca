// Dropout of one element at a time. For many elements, many_tokens/dropout_mask-inl.h draws vectors.
#pragma once

#include <cstdint>

#include "cpp/format/philox.h"

namespace qlora::cpu {

// Whether dropout zeroes the element at `index`, its row-major index in x [M, K].
QLORA_INLINE bool dropped(const Dropout& d, int64_t index) {
  const uint64_t at = static_cast<uint64_t>(d.first + index);
  return d.active() && !d.keeps(philox4x32_10(d.seed, at >> 2).lane[at & 3]);
}

}  // namespace qlora::cpu
