// The scales of a packed weight and its offsets, one per quantization block, and the forms in which they are stored.
// Only two files decode them and depend on the form: cpp/cpu/codec/scales-inl.h and cuda/tile/generic/block_scale.cuh.
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"
#include "cpp/format/portable.h"

namespace qlora {

enum class ScaleForm : int {
  kFloat32,
  kNested8,  // uint8_t codes of dynamic8.h: value8[code] * nested_absmax + nested_offset, rounded twice
  kTable8,   // uint8_t codes of `table`: table[code], times nested_absmax where there is one
  kFloat16,
  kBFloat16,
};

// A weight with offsets is round(round(value[code] * scale) + offset) in float32, and a weight with zero points
// round((value[code] - zero point) * scale). The CPU's linear kernels add -round(zero point * scale) instead, which
// differs by a rounding where scales are float32.
enum class OffsetForm : int {
  kNone,
  kFloat32,
  kFloat16,
  kBFloat16,
  kZeroPoint8,  // uint8_t: -(stored * the block's scale)
  kScaled8,     // uint8_t: -(stored * unit of the nested block)
};

struct Offsets {
  OffsetForm form = OffsetForm::kNone;
  const void* stored = nullptr;  // [blocks], of the form's type
  const float* unit = nullptr;   // kScaled8: [ceil(blocks / nested_block_size)]

  QLORA_HD constexpr explicit operator bool() const { return form != OffsetForm::kNone; }
};

struct Scales {
  ScaleForm form = ScaleForm::kFloat32;
  const void* stored = nullptr;          // [blocks], of the form's type
  const float* nested_absmax = nullptr;  // [ceil(blocks / nested_block_size)]
  const float* nested_offset = nullptr;  // [1]
  int64_t block_size = 64;
  int64_t nested_block_size = 256;
  const float* table = nullptr;  // [256]
  Offsets offsets;

  QLORA_HD const float* floats() const { return static_cast<const float*>(stored); }
  QLORA_HD const uint8_t* codes() const { return static_cast<const uint8_t*>(stored); }
};

QLORA_INLINE Scales float_scales(const float* absmax, int64_t block_size) {
  Scales s;
  s.stored = absmax;
  s.block_size = block_size;
  return s;
}
QLORA_INLINE Scales nested_scales(const uint8_t* codes, const float* nested_absmax, const float* nested_offset,
                                  int64_t block_size, int64_t nested_block_size) {
  return {ScaleForm::kNested8, codes, nested_absmax, nested_offset, block_size, nested_block_size, nullptr, {}};
}

// Of a block with an offset.
struct ScaleAndOffset {
  float scale, offset;
};

QLORA_HD int64_t stored_bytes(ScaleForm form) {
  return form == ScaleForm::kFloat32 ? 4 : form == ScaleForm::kFloat16 || form == ScaleForm::kBFloat16 ? 2 : 1;
}
QLORA_HD int64_t stored_bytes(OffsetForm form) {
  return form == OffsetForm::kFloat32 ? 4 : form == OffsetForm::kFloat16 || form == OffsetForm::kBFloat16 ? 2 : 1;
}

// Returns the scales and offsets of the weight that is `weights` weights further in a stack, where weights lie `blocks`
// blocks and `nested_blocks` nested blocks apart. Each weight has a table of its own.
QLORA_HD Scales scales_after(Scales s, int64_t weights, int64_t blocks, int64_t nested_blocks) {
  s.stored = static_cast<const char*>(s.stored) + weights * blocks * stored_bytes(s.form);
  if (s.nested_absmax) s.nested_absmax += weights * nested_blocks;
  if (s.nested_offset) s.nested_offset += weights;
  if (s.table) s.table += weights * 256;
  if (s.offsets) {
    s.offsets.stored = static_cast<const char*>(s.offsets.stored) + weights * blocks * stored_bytes(s.offsets.form);
    if (s.offsets.unit) s.offsets.unit += weights * nested_blocks;
  }
  return s;
}

}  // namespace qlora
