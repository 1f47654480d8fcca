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

// Widens the first numbers, if the set has a faster way for many, and returns how many.
inline int64_t widen_first(const float16* from, int64_t count, float* out) {
  return codec::widen_many_scales(from, count, out);
}
template <class T>
inline int64_t widen_first(const T*, int64_t, float*) {
  return 0;
}

template <class T>
inline void widen_many(const void* stored, int64_t first, int64_t count, float* out) {
  const T* const from = static_cast<const T*>(stored) + first;
  for (int64_t i = widen_first(from, count, out); i < count; ++i) out[i] = to_float(from[i]);
}

// The codes' type is volatile for the reason that decode_scales gives.
inline void look_up_scales(const volatile uint8_t* codes, int64_t count, const float* table, float* out) {
  int64_t i = codec::look_up_many_scales(const_cast<const uint8_t*>(codes), count, table, out);
#pragma GCC unroll 8
  for (; i < count; ++i) out[i] = table[codes[i]];
}

// Calls use(begin, count, nested block) for each part of blocks first .. first + count - 1 in one nested block; `begin`
// counts from `first`.
template <class Use>
inline void for_each_nested_block(const Scales& scales, int64_t first, int64_t count, const Use& use) {
  const int64_t size = scales.nested_block_size;
  for (int64_t begin = 0; begin < count;) {
    const int64_t nested_block = nested_block_of(scales, first + begin);
    const int64_t here = min((nested_block + 1) * size - (first + begin), count - begin);
    use(begin, here, nested_block);
    begin += here;
  }
}

// Calls use(begin, count, unit) for each part of blocks first .. first + count - 1 in one nested block. `begin` counts
// from `first`, and `unit` is that of the nested block. Nested blocks of 8, those of GGUF's Q4_K, have a loop of their
// own with a constant count, because the other one is set up anew for each of them.
template <class Use>
inline void for_each_unit(const Scales& scales, const float* unit, int64_t first, int64_t count, const Use& use) {
  constexpr int64_t kSmall = 8;
  int64_t i = 0;
  if (scales.nested_block_size == kSmall) {
    i = min(round_up(first, kSmall) - first, count);
    if (i) use(0, i, unit[first / kSmall]);
    for (const float* of_block = unit + (first + i) / kSmall; i + kSmall <= count; i += kSmall)
      use(i, kSmall, *of_block++);
  }
  for_each_nested_block(scales, first + i, count - i, [&](int64_t begin, int64_t here, int64_t nested_block) {
    use(i + begin, here, unit[nested_block]);
  });
}

// out[i] = codes[i] * step * the unit of the nested block of block first + i, rounded after each product
inline void multiply_codes(const Scales& scales, const uint8_t* codes, float step, const float* unit, int64_t first,
                           int64_t count, float* out) {
  for_each_unit(scales, unit, first, count, [=](int64_t begin, int64_t here, float by) {
    int64_t i = begin;
    for (; i + 8 <= begin + here; i += 8) codec::multiply_eight(codes + i, step, by, out + i);
    for (; i < begin + here; ++i) out[i] = static_cast<float>(codes[i]) * step * by;
  });
}

// Whether table[code] is code * table[1], to the bit. Q4_K's is: its scales are integers times the nested block's unit.
inline bool is_linear(const float* table) {
  uint32_t difference = 0;
  for (int code = 0; code < 256; ++code)
    difference |= float_bits(static_cast<float>(code) * table[1]) ^ float_bits(table[code]);
  return difference == 0;
}

// out[i] = the scale of block first + i, of a weight whose scales are in a table
inline void read_table_scales(const Scales& scales, int64_t first, int64_t count, float* out) {
  const uint8_t* const codes = scales.codes() + first;
  const float* const unit = scales.nested_absmax;
  constexpr int64_t kWorthwhile = 64;  // to look at the whole table
  if (unit && count >= kWorthwhile && is_linear(scales.table))
    return multiply_codes(scales, codes, scales.table[1], unit, first, count, out);
  look_up_scales(codes, count, scales.table, out);
  if (!unit) return;
  for_each_unit(scales, unit, first, count, [=](int64_t begin, int64_t here, float by) {
    for (int64_t i = begin; i < begin + here; ++i) out[i] *= by;
  });
}

// out[i] = the scale of block first + i
inline void read_scales(const Scales& scales, int64_t first, int64_t count, float* out) {
  switch (scales.form) {
    case ScaleForm::kFloat32:
      for (int64_t i = 0; i < count; ++i) out[i] = scales.floats()[first + i];
      return;
    case ScaleForm::kFloat16:
      return widen_many<float16>(scales.stored, first, count, out);
    case ScaleForm::kBFloat16:
      return widen_many<bfloat16>(scales.stored, first, count, out);
    case ScaleForm::kTable8:
      return read_table_scales(scales, first, count, out);
    case ScaleForm::kNested8:
      for_each_nested_block(scales, first, count, [&](int64_t begin, int64_t here, int64_t nested_block) {
        decode_scales(scales.codes() + first + begin, here, scales.nested_absmax[nested_block], *scales.nested_offset,
                      out + begin);
      });
  }
}

// Returns the same scales in place if they are stored as float32, and otherwise decoded into `memory`.
inline const float* scales_at(const Scales& scales, int64_t first, int64_t count, float* memory) {
  if (scales.form == ScaleForm::kFloat32) return scales.floats() + first;
  read_scales(scales, first, count, memory);
  return memory;
}

// out[i] = the offset of block first + i, whose scale is scale[i]. The weight has offsets.
inline void read_offsets(const Scales& scales, int64_t first, int64_t count, const float* scale, float* out) {
  const Offsets& offsets = scales.offsets;
  const auto* const bytes = static_cast<const uint8_t*>(offsets.stored) + first;  // of the 8-bit forms
  switch (offsets.form) {
    case OffsetForm::kNone:
      return;
    case OffsetForm::kFloat32:
      return widen_many<float>(offsets.stored, first, count, out);
    case OffsetForm::kFloat16:
      return widen_many<float16>(offsets.stored, first, count, out);
    case OffsetForm::kBFloat16:
      return widen_many<bfloat16>(offsets.stored, first, count, out);
    case OffsetForm::kZeroPoint8:
      // `scale` may be `out`, which GCC need not know to vectorize the loop.
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = -(static_cast<float>(bytes[i]) * scale[i]);
      return;
    case OffsetForm::kScaled8:
      return multiply_codes(scales, bytes, -1.0f, offsets.unit, first, count, out);
  }
}

// out[i] = minus the zero point of block first + i. The weight's offsets are zero points.
inline void read_zero_points(const Scales& scales, int64_t first, int64_t count, float* out) {
  const auto* const zero_points = static_cast<const uint8_t*>(scales.offsets.stored) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = -static_cast<float>(zero_points[i]);
}

// Prefetches the stored scales of blocks first .. first + count - 1, and their offsets.
inline void prefetch_scales(const Scales& scales, int64_t first, int64_t count) {
  const int64_t bytes = stored_bytes(scales.form);
  prefetch(static_cast<const char*>(scales.stored) + first * bytes, count * bytes);
  if (const Offsets& offsets = scales.offsets) {
    const int64_t offset_bytes = stored_bytes(offsets.form);
    prefetch(static_cast<const char*>(offsets.stored) + first * offset_bytes, count * offset_bytes);
    if (offsets.form != OffsetForm::kScaled8) return;
    const int64_t nested = nested_block_of(scales, first);
    const int64_t nested_count = nested_block_of(scales, first + count - 1) + 1 - nested;
    prefetch(offsets.unit + nested, nested_count * 4);
    if (scales.nested_absmax) prefetch(scales.nested_absmax + nested, nested_count * 4);
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

// The largest finite magnitude, where `bits` are those of the largest magnitude.
inline float largest_finite(const float* x, int64_t count, uint32_t bits) {
  return bits_float(bits < kInfinityBits ? bits : largest_finite_bits(x, count));
}

inline constexpr int64_t kScalesAtOnce = 64;

// Calls use(scale, count) for each part of blocks first .. first + count - 1, with their scales as float32.
template <class Use>
inline void for_each_scales(const Scales& scales, int64_t first, int64_t count, const Use& use) {
  if (scales.form == ScaleForm::kFloat32) return use(scales.floats() + first, count);
  float memory[kScalesAtOnce];
  for (int64_t begin = 0; begin < count; begin += kScalesAtOnce) {
    const int64_t here = min(count - begin, kScalesAtOnce);
    read_scales(scales, first + begin, here, memory);
    use(memory, here);
  }
}

// Returns an upper bound on the finite scales of blocks first .. last. `largest_bits(x, count)` returns the bits of the
// largest magnitude among float32 numbers, as a kernel's vectors find it.
template <class LargestBits>
inline float scale_bound(const Scales& scales, int64_t first, int64_t last, const LargestBits& largest_bits) {
  if (scales.form == ScaleForm::kNested8) {
    const int64_t nested = nested_block_of(scales, first), last_nested = nested_block_of(scales, last);
    const uint32_t bits = largest_finite_bits(scales.nested_absmax + nested, last_nested + 1 - nested);
    return bits_float(bits) + bits_float(float_bits(*scales.nested_offset) & kMagnitudeBits);
  }
  float most = 0.0f;
  for_each_scales(scales, first, last + 1 - first, [&](const float* scale, int64_t count) {
    const float of_part = largest_finite(scale, count, largest_bits(scale, count));
    most = of_part > most ? of_part : most;
  });
  return most;
}

// Returns whether each of the first `count` scales has a magnitude of at least `least`, a normal number of at most
// 2^-30, or is 0. The block's offset, if there is one, must then have such a magnitude or be 0.
inline bool scales_at_least(const Pool& pool, const Scales& scales, int64_t count, float least) {
  // Nested scales are 0, or no smaller than the unit in the last place of their mean.
  if (scales.form == ScaleForm::kNested8 && !scales.offsets) return *scales.nested_offset > 0x1p-30f;
  bool all = true;
  auto body = [&](int64_t begin, int64_t end) {
    uint32_t smallest = ~0u;  // the smallest of bits - 1, where 0 becomes the largest
    const auto see = [&](const float* x, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = (float_bits(x[i]) & kMagnitudeBits) - 1u;
        smallest = bits < smallest ? bits : smallest;
      }
    };
    if (!scales.offsets) {
      for_each_scales(scales, begin, end - begin, see);
    } else {
      float scale[kScalesAtOnce], offset[kScalesAtOnce];
      for (int64_t first = begin; first < end; first += kScalesAtOnce) {
        const int64_t here = min(end - first, kScalesAtOnce);
        read_scales(scales, first, here, scale);
        read_offsets(scales, first, here, scale, offset);
        for (int64_t i = 0; i < here; ++i) scale[i] = scale[i] == 0.0f ? offset[i] : scale[i];
        see(scale, here);
      }
    }
    if (smallest < float_bits(least) - 1u) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
  };
  pool(count, 1 << 15, body);
  return all;
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
