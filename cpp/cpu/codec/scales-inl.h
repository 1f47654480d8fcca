// The scales of a weight's quantization blocks as float32, whatever form they are kept in.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/dynamic8.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

inline float decode_scale(uint8_t code, float nested_absmax, float nested_offset) {
  const float product = kDynamic8.value[code] * nested_absmax;
  return product + nested_offset;
}

// Scales of one nested block. The codes' type is volatile, or GCC vectorizes the look-ups, with a dozen moves between
// register files a code.
inline void decode_scales(const volatile uint8_t* codes, int64_t count, float nested_absmax, float nested_offset,
                          float* out) {
  int64_t i = codec::decode_many_scales(const_cast<const uint8_t*>(codes), count, nested_absmax, nested_offset, out);
  for (; i < count; ++i) out[i] = decode_scale(codes[i], nested_absmax, nested_offset);
}

// The nested block that a quantization block lies in: by a shift, where it can be, for a division costs as much as a
// few scales.
inline int64_t nested_block_of(const Scales& scales, int64_t block) {
  const uint64_t size = static_cast<uint64_t>(scales.nested_block_size);
  return (size & (size - 1)) == 0 ? block >> __builtin_ctzll(size) : block / scales.nested_block_size;
}

// out[i] = the scale of block first + i
inline void read_scales(const Scales& scales, int64_t first, int64_t count, float* out) {
  if (scales.absmax) {
    for (int64_t i = 0; i < count; ++i) out[i] = scales.absmax[first + i];
    return;
  }
  const int64_t size = scales.nested_block_size;
  while (count > 0) {
    const int64_t nested_block = nested_block_of(scales, first);
    const int64_t left = (nested_block + 1) * size - first, here = left < count ? left : count;
    decode_scales(scales.codes + first, here, scales.nested_absmax[nested_block], *scales.nested_offset, out);
    first += here, out += here, count -= here;
  }
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
