// Conversions between float32 and the 16-bit types, two values per register. Each value is rounded once, to nearest
// even. cvt to two values exists since sm_80.
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"

namespace qlora::ptx {

// Packs (low, high) into one register.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<bfloat16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  const auto round = [](float v) {
    const uint32_t bits = __float_as_uint(v);
    return v != v ? 0x7FFFu : bits + 0x7FFFu + (bits >> 16 & 1) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}

template <>
__device__ __forceinline__ uint32_t pack2<float16>(float low, float high) {
  uint32_t d;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("{\n\t.reg .b16 l, h;\n\tcvt.rn.f16.f32 l, %2;\n\tcvt.rn.f16.f32 h, %1;\n\tmov.b32 %0, {l, h};\n\t}"
      : "=r"(d)
      : "f"(high), "f"(low));
#endif
  return d;
}

// Unpacks the two values of a register. A bfloat16 is the upper half of a float32, so a single shift or mask suffices.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack2<bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

template <>
__device__ __forceinline__ float2 unpack2<float16>(uint32_t pair) {
  float2 v;
  asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(pair));
  return v;
}

// Widens the float16 in the lower half of a register.
__device__ __forceinline__ float widen_float16(uint32_t bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(static_cast<uint16_t>(bits)));
  return v;
}

}  // namespace qlora::ptx
