// Loops whose count is a constant and whose body must see it as one, so that arrays of vectors stay in registers. (A
// pragma unrolls too late for that in GCC 12: the array has been given an address by then.)
#pragma once

namespace qlora::cpu {

template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
  constexpr operator int() const { return kIndex; }
};

// body(Index<0>) ... body(Index<kCount - 1>)
template <int kCount, class Body>
[[gnu::always_inline]] inline void unroll(Body&& body) {
  if constexpr (kCount > 0) {
    unroll<kCount - 1>(body);
    body(Index<kCount - 1>{});
  }
}

}  // namespace qlora::cpu
