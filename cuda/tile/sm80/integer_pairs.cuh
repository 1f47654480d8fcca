// Decodes packed codes of consecutive integers, less a block's zero point, to the two halves of a register: exact
// integers, ready to be an operand of mma. 8 weights take 13 instructions, and none of them is a load.
//
// A byte's high nibble belongs into the lower half, its low nibble into the upper half (pair_table.cuh). There, four
// mantissa bits of a power of two have the weights 8, 4, 2 and 1. Replacing these bits by those of 15 - q adds 15 - q:
//
//                    lower half                        upper half
//   from             byte of word >> 1, bits 3 to 6    byte of word, bits 0 to 3
//   bfloat16         16 + (15 - q)                     128 + (15 - q)
//   float16          128 + (15 - q)                    1024 + (15 - q)
//
// Subtracting these from a constant of the block (`minuend`) leaves q - zero point. The minuend is a small number,
// which both types hold exactly, because q enters as 15 - q: a minuend for q itself would exceed bfloat16's 256.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/dtypes.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/fma2.cuh"
#include "cuda/ptx/lop3.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::tile {

template <class T>
struct IntegerPairs {
  // `zero_point` is subtracted from q: 0 to 255, and 8 more for codes that begin at -8.
  __device__ __forceinline__ static uint32_t minuend(float zero_point) {
    return ptx::pack2<T>(kLower + 15.0f - zero_point, 8.0f * kLower + 15.0f - zero_point);
  }

  // The pairs of the four bytes of `word`.
  __device__ __forceinline__ static void decode(uint32_t word, uint32_t minuend, uint32_t (&pairs)[4]) {
    const uint32_t shifted = word >> 1;
    unroll<4>([&](auto i) {
      const uint32_t both = ptx::prmt<0x4400u + 0x1111u * i>(shifted, word);
      pairs[i] = ptx::fma2<T>(ptx::andnot_or(both, 0x000F0078u, kPowers), kMinusOnes, minuend);
    });
  }

 private:
  static constexpr bool kIsBfloat16 = std::is_same_v<T, bfloat16>;
  static constexpr float kLower = kIsBfloat16 ? 16.0f : 128.0f;
  static constexpr uint32_t kPowers = kIsBfloat16 ? 0x43004180u : 0x64005800u;  // 8 * kLower and kLower
  static constexpr uint32_t kMinusOnes = kIsBfloat16 ? 0xBF80BF80u : 0xBC00BC00u;
};

}  // namespace qlora::tile
