// Adds what zero points leave of offsets (IntegerPairs::split): a row's residual of a block times a token's sum of x
// over the block. Tensor cores do both.
//
// For the sums, x is the mma's row operand, and its column operand is 1 in the columns of the block and 0 elsewhere.
// The result is the column operand of the product with the residuals. Both factors of that product are split into two
// bfloat16, so that its errors are about 2^-16, and one mma takes four blocks:
//
//   k            2t        2t + 1    2t + 8    2t + 9
//   residuals    low       high      low       high        of block t, row g or g + 8
//   sums         high      high      low       low         of block t, token g
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/dtypes.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/float_bits.cuh"
#include "cuda/ptx/mma.cuh"

namespace qlora::tile {

__device__ __forceinline__ float upper_half(float v) { return ptx::mask_bits(v, 0xFFFF0000u); }

// The residual's word in the row operand.
__device__ __forceinline__ uint32_t split_residual(float residual) {
  const float high = upper_half(residual);
  return ptx::pack2<bfloat16>(residual - high, high);
}

// The column operand for block `block` of four, in lanes that hold k of the block.
template <class T>
__device__ __forceinline__ uint32_t block_ones(int block) {
  constexpr uint32_t kOnes = std::is_same_v<T, bfloat16> ? 0x3F803F80u : 0x3C003C00u;
  return static_cast<int>(threadIdx.x % 32 / 8) == block ? kOnes : 0u;
}

// The sums of x over four blocks, for one or two token tiles. Lane (g, t) ends up with that of the tile's row g and
// block t. With two tiles, the second is the row operand's rows 8 to 15. With one, these rows are its every second
// step.
template <int kTiles>
class BlockSums {
 public:
  static_assert(kTiles == 1 || kTiles == 2);

  // Adds two steps' operands of x.
  template <class T>
  __device__ __forceinline__ void add(const uint4 (&x)[kTiles], uint32_t ones) {
    if constexpr (kTiles == 1) {
      ptx::mma_m16n8k16<T>(sum_, x[0].x, x[0].z, x[0].y, x[0].w, ones, ones);
    } else {
      ptx::mma_m16n8k16<T>(sum_, x[0].x, x[1].x, x[0].y, x[1].y, ones, ones);
      ptx::mma_m16n8k16<T>(sum_, x[0].z, x[1].z, x[0].w, x[1].w, ones, ones);
    }
  }

  // Returns the lane's sums and begins anew.
  __device__ __forceinline__ void take(float (&sums)[kTiles]) {
    if constexpr (kTiles == 1)
      sums[0] = sum_[0] + sum_[2];
    else
      sums[0] = sum_[0], sums[1] = sum_[2];
    sum_[0] = sum_[1] = sum_[2] = sum_[3] = 0.0f;
  }

 private:
  float sum_[4] = {};
};

// The column operand of the product with the residuals.
__device__ __forceinline__ uint2 split_sum(float sum) {
  const float high = upper_half(sum), low = sum - high;
  return make_uint2(ptx::pack2<bfloat16>(high, high), ptx::pack2<bfloat16>(low, low));
}

// acc += residuals * sums, for residuals of rows g and g + 8.
__device__ __forceinline__ void add_residuals(float (&acc)[4], uint32_t residual0, uint32_t residual1, uint2 sums) {
  ptx::mma_m16n8k16<bfloat16>(acc, residual0, residual1, residual0, residual1, sums.x, sums.y);
}

}  // namespace qlora::tile
