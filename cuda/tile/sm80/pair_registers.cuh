// Decodes packed codes in registers, to the same pairs as the table in shared memory
// (cuda/tile/generic/pair_table.cuh). 8 weights take 21 instructions instead of 8, but none of them is a load. Kernels
// that are bound by shared memory decode a part of their weights this way.
//
// The lower bytes of the 16 values form one table of 16 bytes, in four registers, and the upper bytes another. prmt
// looks up four bytes among 8, selected by the lower three bits of four nibbles. A third prmt then uses the fourth bit
// to choose between the results from values 0..7 and from values 8..15.
#pragma once

#include <cstdint>

#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/hold.cuh"
#include "cuda/ptx/prmt.cuh"
#include "cuda/tile/generic/pair_table.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::tile {

template <class T>
class PairRegisters {
 public:
  __device__ __forceinline__ explicit PairRegisters(const CodeView& code) {
    code.with_values([&](const auto& value_of) {
      const auto pair = [&](int at) {
        return ptx::pack2<T>(value_of(at) * code.factor, value_of(at + 1) * code.factor);
      };
      unroll<4>([&](auto i) {
        const uint32_t even = pair(4 * i), odd = pair(4 * i + 2);
        low_[i] = ptx::prmt<0x6420>(even, odd), high_[i] = ptx::prmt<0x7531>(even, odd);
      });
    });
    unroll<4>([&](auto i) { ptx::hold(low_[i]), ptx::hold(high_[i]); });
  }

  // The pairs of the four bytes of `word`.
  __device__ __forceinline__ void decode(uint32_t word, uint32_t (&pairs)[4]) const {
    const uint32_t index = word & 0x77777777u;
    // Nibble i of `half` selects byte i of the first lookup, or byte i + 4, which is byte i of the second.
    const uint32_t half = (word >> 1 & 0x44444444u) | 0x32103210u;
    decode_2(index, half, pairs[0], pairs[1]);
    decode_2(index >> 16, half >> 16, pairs[2], pairs[3]);
  }

 private:
  // Uses the lower 16 bits of both selectors.
  __device__ __forceinline__ void decode_2(uint32_t index, uint32_t half, uint32_t& pair0, uint32_t& pair1) const {
    const uint32_t low = lookup(low_, index, half), high = lookup(high_, index, half);
    // Nibbles 0 and 1, and 2 and 3, are the lower and the upper nibble of a byte: the upper and the lower half of its
    // pair.
    pair0 = ptx::prmt<0x4051>(low, high), pair1 = ptx::prmt<0x6273>(low, high);
  }

  __device__ __forceinline__ static uint32_t lookup(const uint32_t (&bytes)[4], uint32_t index, uint32_t half) {
    return ptx::prmt(ptx::prmt(bytes[0], bytes[1], index), ptx::prmt(bytes[2], bytes[3], index), half);
  }

  uint32_t low_[4], high_[4];
};

}  // namespace qlora::tile
