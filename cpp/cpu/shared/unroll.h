// Loops whose count is a constant and whose body must see it as one, so that arrays of vectors stay in registers. (A
// pragma unrolls too late for that in GCC 12: the array has been given an address by then.)
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora::cpu {

template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
  QLORA_INLINE constexpr operator int() const { return kIndex; }
};

// body(Index<0>) ... body(Index<kCount - 1>)
template <int kCount, class Body>
QLORA_INLINE void unroll(Body&& body) {
  if constexpr (kCount > 0) {
    unroll<kCount - 1>(body);
    body(Index<kCount - 1>{});
  }
}

// body(Index<count>), for a count in 1 .. kMost that is known at run time only
template <int kMost, class Body>
inline void with_count(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, body);
  }
  body(Index<kMost>{});
}

}  // namespace qlora::cpu
