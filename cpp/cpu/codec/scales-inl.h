// The scales of a weight's quantization blocks as float32, whatever form they are stored in, and their offsets. No
// other CPU code asks for the form.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/codec.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
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
  if (scales.form == ScaleForm::kFloat32) {
    for (int64_t i = 0; i < count; ++i) out[i] = scales.floats()[first + i];
    return;
  }
  const int64_t size = scales.nested_block_size;
  while (count > 0) {
    const int64_t nested_block = nested_block_of(scales, first);
    const int64_t left = (nested_block + 1) * size - first, here = left < count ? left : count;
    decode_scales(scales.codes() + first, here, scales.nested_absmax[nested_block], *scales.nested_offset, out);
    first += here, out += here, count -= here;
  }
}

// The same, where they lie if that is as float32, and otherwise decoded into `memory`.
inline const float* scales_at(const Scales& scales, int64_t first, int64_t count, float* memory) {
  if (scales.form == ScaleForm::kFloat32) return scales.floats() + first;
  read_scales(scales, first, count, memory);
  return memory;
}

// The offsets of blocks first and later; null where the weight has none.
inline const float* offsets_at(const Scales& scales, int64_t first) {
  return scales.offsets ? scales.offsets + first : nullptr;
}

// Asks for the scales of blocks first .. first + count - 1, as they are stored.
inline void prefetch_scales(const Scales& scales, int64_t first, int64_t count) {
  if (scales.form == ScaleForm::kFloat32) {
    prefetch(scales.floats() + first, count * static_cast<int64_t>(sizeof(float)));
  } else {
    prefetch(scales.codes() + first, count);
  }
}

// The bits of the largest magnitude among finite numbers; 0 if there are none.
inline uint32_t largest_finite_bits(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & kMagnitudeBits;
    largest = magnitude > largest && magnitude < kInfinityBits ? magnitude : largest;
  }
  return largest;
}

// No finite scale of blocks first .. last is larger. `largest_bits(x, count)` gives the bits of the largest magnitude
// among float32 numbers, as a kernel's vectors find it.
template <class LargestBits>
inline float scale_bound(const Scales& scales, int64_t first, int64_t last, const LargestBits& largest_bits) {
  if (scales.form == ScaleForm::kFloat32) {
    const float* const absmax = scales.floats() + first;
    const uint32_t bits = largest_bits(absmax, last + 1 - first);
    return bits_float(bits < kInfinityBits ? bits : largest_finite_bits(absmax, last + 1 - first));
  }
  const int64_t nested = nested_block_of(scales, first), last_nested = nested_block_of(scales, last);
  const uint32_t bits = largest_finite_bits(scales.nested_absmax + nested, last_nested + 1 - nested);
  return bits_float(bits) + bits_float(float_bits(*scales.nested_offset) & kMagnitudeBits);
}

// Whether each of the first `count` scales is 0 or at least `least`, a normal number of at most 2^-30.
inline bool scales_at_least(const Pool& pool, const Scales& scales, int64_t count, float least) {
  // Doubly quantized scales are 0 or no smaller than a last place of their mean.
  if (scales.form == ScaleForm::kNested8) return *scales.nested_offset > 0x1p-30f;
  bool all = true;
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t smallest = ~0u;  // of the bits minus 1, which makes a scale of 0 the largest
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t bits = (float_bits(scales.floats()[i]) & kMagnitudeBits) - 1u;
      smallest = bits < smallest ? bits : smallest;
    }
    if (smallest < float_bits(least) - 1u) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
  };
  pool(count, 1 << 15, body);
  return all;
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
