// The 16 bytes of a tensor that one lane holds, for kernels that read float32, bfloat16 and float16 alike.
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/load.cuh"
#include "cuda/ptx/max2.cuh"

namespace qlora::tile {

inline constexpr int kWarp = 32;

// Returns whether `p` is aligned for vector accesses of kBytes. If not, kernels take their element-wise path.
template <int kBytes>
__device__ __forceinline__ bool is_aligned(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & (kBytes - 1)) == 0;
}

template <class T>
struct LaneValues {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(T));

  uint32_t word[4] = {};

  // `p` is aligned to 16 bytes.
  template <int kOffset = 0>
  __device__ __forceinline__ void load(const T* p) {
    const uint4 v = ptx::load_stream_v4<kOffset>(p);
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  }

  // Loads the first `count` values, which may also be negative or more than kCount, and sets the others to zero.
  __device__ __forceinline__ void load_tail(const T* p, int64_t count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count) continue;
      if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(p[i]);
      } else {
        word[i / 2] |= uint32_t{p[i].bits} << (i % 2 * 16);
      }
    }
  }

  // The bits of value i as float32. The conversion is exact.
  __device__ __forceinline__ uint32_t float_bits(int i) const;

  // max |value| as float32 bits. These order like the magnitudes: infinity is above all finite numbers, and NaN above
  // infinity.
  __device__ __forceinline__ uint32_t max_magnitude() const;
};

template <>
__device__ __forceinline__ uint32_t LaneValues<float>::float_bits(int i) const {
  return word[i];
}
template <>
__device__ __forceinline__ uint32_t LaneValues<bfloat16>::float_bits(int i) const {
  return i % 2 ? word[i / 2] & 0xFFFF0000u : word[i / 2] << 16;
}
template <>
__device__ __forceinline__ uint32_t LaneValues<float16>::float_bits(int i) const {
  const float2 pair = ptx::unpack2<float16>(word[i / 2]);
  return __float_as_uint(i % 2 ? pair.y : pair.x);
}

template <>
__device__ __forceinline__ uint32_t LaneValues<float>::max_magnitude() const {
  constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
  return max(max(word[0] & kMagnitude, word[1] & kMagnitude), max(word[2] & kMagnitude, word[3] & kMagnitude));
}

template <class T>
__device__ __forceinline__ uint32_t LaneValues<T>::max_magnitude() const {
  constexpr uint32_t kMagnitude = 0x7FFF7FFFu;
  LaneValues<T> pair;
  pair.word[0] = ptx::max2_nan<T>(ptx::max2_nan<T>(word[0] & kMagnitude, word[1] & kMagnitude),
                                  ptx::max2_nan<T>(word[2] & kMagnitude, word[3] & kMagnitude));
  return max(pair.float_bits(0), pair.float_bits(1));
}

}  // namespace qlora::tile
