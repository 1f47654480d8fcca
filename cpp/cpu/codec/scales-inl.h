// Reads the scales of a weight's quantization blocks as float32 from any form in which they can be stored, and their
// offsets. No other CPU code depends on the form.
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

// Decodes scales of one nested block. The codes' type is volatile because GCC would otherwise vectorize the lookups, at
// a dozen moves between register files per code.
inline void decode_scales(const volatile uint8_t* codes, int64_t count, float nested_absmax, float nested_offset,
                          float* out) {
  int64_t i = codec::decode_many_scales(const_cast<const uint8_t*>(codes), count, nested_absmax, nested_offset, out);
  for (; i < count; ++i) out[i] = decode_scale(codes[i], nested_absmax, nested_offset);
}

// Returns the nested block of a quantization block, by a shift if possible, because a division costs as much as
// decoding a few scales.
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

// Returns the same scales in place if they are stored as float32, and otherwise decoded into `memory`.
inline const float* scales_at(const Scales& scales, int64_t first, int64_t count, float* memory) {
  if (scales.form == ScaleForm::kFloat32) return scales.floats() + first;
  read_scales(scales, first, count, memory);
  return memory;
}

// The offsets of blocks `first` and later, or null if the weight has none.
inline const float* offsets_at(const Scales& scales, int64_t first) {
  return scales.offsets ? scales.offsets + first : nullptr;
}

// Prefetches the stored scales of blocks first .. first + count - 1.
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

// Returns an upper bound on the finite scales of blocks first .. last. `largest_bits(x, count)` returns the bits of the
// largest magnitude among float32 numbers, as a kernel's vectors find it.
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

// Returns whether each of the first `count` scales is 0 or has a magnitude of at least `least`, a normal number of at
// most 2^-30.
inline bool scales_at_least(const Pool& pool, const Scales& scales, int64_t count, float least) {
  // Nested scales are 0, or no smaller than the unit in the last place of their mean.
  if (scales.form == ScaleForm::kNested8) return *scales.nested_offset > 0x1p-30f;
  bool all = true;
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t smallest = ~0u;  // the smallest of bits - 1, where a scale of 0 becomes the largest
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
