// Conversions of single elements, for tails and for shapes that vector accesses do not fit.
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"
#include "cuda/ptx/convert.cuh"

namespace qlora::tile {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bfloat16 v) { return ptx::unpack2<bfloat16>(v.bits).x; }
__device__ __forceinline__ float widen(float16 v) { return ptx::unpack2<float16>(v.bits).x; }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T narrow(float v) {
  return T{static_cast<uint16_t>(ptx::pack2<T>(v, 0.0f))};
}
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}

}  // namespace qlora::tile
