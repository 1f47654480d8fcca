// The scales of a packed tensor as kernels take them: block sizes as shifts, so that no index is divided.
#pragma once

#include <bit>
#include <cstdint>

#include "cpp/format/problem.h"

namespace qlora::cuda {

struct BlockScales {
  const float* absmax = nullptr;  // null when the scales are nested
  const uint8_t* codes = nullptr;
  const float* nested_absmax = nullptr;
  const float* nested_offset = nullptr;
  int block_shift = 0;
  int nested_shift = 0;

  // Both block sizes are powers of two.
  static BlockScales of(const Scales& s) {
    return {s.absmax,        s.codes, s.nested_absmax, s.nested_offset, std::countr_zero(static_cast<uint64_t>(s.block_size)),
            std::countr_zero(static_cast<uint64_t>(s.nested_block_size))};
  }

  __device__ __forceinline__ float offset() const { return codes ? *nested_offset : 0.0f; }

  // absmax of block `b`. `dynamic8` is the code map in shared memory and `offset` what offset() gave.
  __device__ __forceinline__ float decode(int64_t b, const float* dynamic8, float offset) const {
    if (!codes) return absmax[b];
    return __fadd_rn(__fmul_rn(dynamic8[codes[b]], nested_absmax[b >> nested_shift]), offset);
  }
};

}  // namespace qlora::cuda
