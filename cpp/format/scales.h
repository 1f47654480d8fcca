// The scales of a packed weight, one per quantization block, and the forms in which they are stored. Only two files
// decode them and depend on the form: cpp/cpu/codec/scales-inl.h and cuda/tile/any/block_scale.cuh.
#pragma once

#include <cstdint>

#include "cpp/format/portable.h"

namespace qlora {

enum class ScaleForm : int {
  kFloat32,  // stored: float [blocks]
  kNested8,  // stored: uint8_t [blocks], codes of dynamic8.h: value8[code] * nested_absmax + nested_offset, rounded
             // twice
};

struct Scales {
  ScaleForm form = ScaleForm::kFloat32;
  const void* stored = nullptr;          // [blocks], of the form's type
  const float* nested_absmax = nullptr;  // [ceil(blocks / nested_block_size)]
  const float* nested_offset = nullptr;  // [1]
  int64_t block_size = 64;
  int64_t nested_block_size = 256;
  // [blocks], or null. A weight with offsets is round(round(value[code] * scale) + offset) in float32.
  const float* offsets = nullptr;

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
  return {ScaleForm::kNested8, codes, nested_absmax, nested_offset, block_size, nested_block_size, nullptr};
}

// Returns the scales of the weight that is `weights` weights further in a stack, where weights lie `blocks` blocks and
// `nested_blocks` nested blocks apart.
QLORA_HD Scales scales_after(Scales s, int64_t weights, int64_t blocks, int64_t nested_blocks) {
  if (s.form == ScaleForm::kFloat32) {
    s.stored = s.floats() + weights * blocks;
  } else {
    s.stored = s.codes() + weights * blocks;
    s.nested_absmax += weights * nested_blocks;
    s.nested_offset += weights;
  }
  if (s.offsets) s.offsets += weights * blocks;
  return s;
}

}  // namespace qlora
