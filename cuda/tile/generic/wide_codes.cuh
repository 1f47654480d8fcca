// Reads codes of more than 4 bits, of every width and kind: a lane loads a run of consecutive codes, turns them into
// bytes, and looks up their values in shared memory (stage_values). Only this file knows how cpp/format/packing.h packs
// wide codes into words.
#pragma once

#include <cstdint>

#include "cpp/format/packing.h"
#include "cuda/ptx/prmt.cuh"
#include "cuda/tile/generic/unroll.cuh"

namespace qlora::tile {

// kCount consecutive codes, of which the first is a multiple of kCount. So they lie in one unit. Loading and decoding
// are two steps, so that several runs can be on their way. Loads are cached, because the planes of a unit share
// sectors.
template <int kCount>
class WideRun {
  static_assert(kCount == 4 || kCount == 8);

 public:
  // `packed` is aligned to 8 bytes, or to 4 if the codes have units.
  __device__ __forceinline__ void load(const uint8_t* packed, int64_t first, int bits) {
    if (!has_units(bits)) {
      if constexpr (kCount == 8) {
        const uint2 codes = __ldg(reinterpret_cast<const uint2*>(packed + first));
        low_ = codes.x, high_ = codes.y;
      } else {
        low_ = __ldg(reinterpret_cast<const uint32_t*>(packed + first));
      }
      return;
    }
    const uint8_t* const unit = packed + (first / kUnit) * unit_bytes(bits);
    const int e = static_cast<int>(first % kUnit);
    const uint8_t* const upper = unit + kUnit / 2 + e * (bits - 4) / 8;
    if constexpr (kCount == 8) {
      low_ = __ldg(reinterpret_cast<const uint32_t*>(unit + e / 2));
      high_ = bits == 5 ? __ldg(upper) : __ldg(reinterpret_cast<const uint16_t*>(upper));
    } else {
      low_ = __ldg(reinterpret_cast<const uint16_t*>(unit + e / 2));
      high_ = bits == 5 ? __ldg(upper) >> e % 8 : __ldg(upper);
    }
  }

  // out[i] = finish(the value of code i)
  template <class Finish>
  __device__ __forceinline__ void decode(float (&out)[kCount], int bits, const float* values,
                                         const Finish& finish) const {
    unroll<kCount / 4>([&](auto quad) {
      const uint32_t codes = bytes<quad>(bits);
      unroll<4>([&](auto i) { out[4 * quad + i] = finish(values[codes >> 8 * i & 255]); });
    });
  }

 private:
  // Returns codes 4 * kQuad .. 4 * kQuad + 3 as bytes.
  template <int kQuad>
  __device__ __forceinline__ uint32_t bytes(int bits) const {
    if (!has_units(bits)) return kQuad == 0 ? low_ : high_;
    constexpr uint32_t kNibbles = 0x0F0F0F0Fu, kInterleave = kQuad == 0 ? 0x5140u : 0x7362u;
    const uint32_t low = ptx::prmt<kInterleave>(low_ >> 4 & kNibbles, low_ & kNibbles);
    if (bits == 5) {
      // Each product puts one of the four bits into the lowest place of its byte.
      const uint32_t upper = high_ >> 4 * kQuad & 15;
      return low | (upper * 0x00204081u & 0x01010101u) << 4;
    }
    uint32_t upper = high_ >> 8 * kQuad & 255;
    upper = (upper | upper << 12) & 0x000F000Fu;
    upper = (upper | upper << 6) & 0x03030303u;
    return low | upper << 4;
  }

  uint32_t low_ = 0, high_ = 0;  // 8 bits: the first and the last codes; else the low 4 bits and the upper bits
};

}  // namespace qlora::tile
