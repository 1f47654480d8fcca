// A loop unrolled at compile time, whose index is a constant: for what instructions hold as an immediate.
#pragma once

#include <utility>

namespace qlora::tile {

// std::integral_constant, whose conversion is not __device__.
template <int kIndex>
struct Index {
  __host__ __device__ constexpr operator int() const { return kIndex; }  // implicit, as an index is
};

// body(Index<0>{}), ..., body(Index<kCount - 1>{})
template <int kCount, class Body>
__device__ __forceinline__ void unroll(Body&& body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (body(Index<kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace qlora::tile
