// Loops with a constant count whose body gets the index as a constant, so that arrays of vectors stay in registers. (In
// GCC 12 a pragma unrolls too late for that: the array already has an address.)
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

// body(Index<count>), for a count in 1 .. kMost that is only known at run time
template <int kMost, class Body>
inline void with_count(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, body);
  }
  body(Index<kMost>{});
}

}  // namespace qlora::cpu
