// Reads the scale of a quantization block and its offset, in any of the forms in which they can be stored. There are
// two steps: `load` only reads memory, so it can be issued early, and `decode` turns what was read into the number.
// Other device code depends on the form only if it is compiled per form (with_scale_bytes, with_offsets).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/problem.h"
#include "cuda/ptx/convert.cuh"
#include "cuda/tile/generic/code_tables.cuh"

namespace qlora::tile {

// Scales whose per-block divisions are replaced by shifts.
struct ScaleView {
  Scales scales;
  int64_t blocks = 0;
  int block_shift = 0;
  int nested_shift = -1;        // -1: there is no nested absmax, or nested_block_size is not a power of two
  int scale_bytes = 4;          // of a stored scale: 1 (a code), 2 or 4
  int offset_bytes = 0;         // of a stored offset, or 0
  bool exact_products = false;  // value * scale is a float32 for every value of the code
};

inline ScaleView make_scale_view(const Scales& scales, int64_t blocks) {
  ScaleView view{scales, blocks};
  while (int64_t{1} << view.block_shift < scales.block_size) ++view.block_shift;
  if (const int64_t n = scales.nested_block_size; scales.nested_absmax && (n & (n - 1)) == 0) {
    view.nested_shift = 0;
    while (int64_t{1} << view.nested_shift < n) ++view.nested_shift;
  }
  view.scale_bytes = static_cast<int>(stored_bytes(scales.form));
  if (scales.offsets) view.offset_bytes = static_cast<int>(stored_bytes(scales.offsets.form));
  return view;
}

// Returns whether a product with a float16 is exact in float32.
inline bool has_short_values(const CodeTable& table) {
  constexpr uint32_t kLower = (1u << 11) - 1;  // mantissa bits below the first 13 significant ones
  uint32_t lower = 0;
  for (const float value : table.value) lower |= __builtin_bit_cast(uint32_t, value) & kLower;
  return lower == 0;
}

inline ScaleView make_scale_view(const Scales& scales, int64_t blocks, Code code) {
  ScaleView view = make_scale_view(scales, blocks);
  view.exact_products = view.scale_bytes == 2 && !is_wide(code) && has_short_values(table_of(code));
  return view;
}
inline ScaleView make_scale_view(const Weight& w) {
  return make_scale_view(w.scales, ceil_div(w.n * w.k, w.scales.block_size), w.code);
}

// Returns the nested block that holds `block`.
__device__ __forceinline__ int64_t nested_block(const ScaleView& view, int64_t block) {
  return view.nested_shift >= 0 ? block >> view.nested_shift : block / view.scales.nested_block_size;
}

__device__ __forceinline__ const uint16_t* scale_halves(const ScaleView& view) {
  return static_cast<const uint16_t*>(view.scales.stored);
}
__device__ __forceinline__ float widen_half(bool is_bfloat16, uint32_t bits) {
  return is_bfloat16 ? __uint_as_float(bits << 16) : ptx::widen_float16(bits);
}

struct RawScale {
  float value = 0.0f;                 // absmax, or what the code's value is multiplied by
  uint32_t code = kDynamic8ZeroCode;  // or the bits of a scale of 16 bits
  int64_t nested = -1;                // the nested block whose absmax `value` is
};

// Loads the scale of `block` into `raw`, which may hold an earlier block's scale. A nested absmax is not read again if
// both blocks share it.
__device__ __forceinline__ void reload_scale(const ScaleView& view, int64_t block, RawScale& raw) {
  if (view.scales.form == ScaleForm::kFloat32) {
    raw.value = __ldg(view.scales.floats() + block);
    return;
  }
  int64_t nested;
  if (view.nested_shift >= 0) {
    nested = block >> view.nested_shift;
  } else if (view.scale_bytes == 2) {
    raw.code = __ldg(scale_halves(view) + block);
    return;
  } else if (view.scales.nested_absmax != nullptr) {
    nested = block / view.scales.nested_block_size;
  } else {
    raw.value = 1.0f;
    raw.code = __ldg(view.scales.codes() + block);
    return;
  }
  raw.code = __ldg(view.scales.codes() + block);
  if (nested != raw.nested) {
    raw.nested = nested;
    raw.value = __ldg(view.scales.nested_absmax + nested);
  }
}

__device__ __forceinline__ RawScale load_scale(const ScaleView& view, int64_t block) {
  RawScale raw;
  reload_scale(view, block, raw);
  return raw;
}

// Calls use(bytes) with the size of a stored scale as a constant, for kernels that are compiled per size.
template <class Use>
__device__ __forceinline__ void with_scale_bytes(const ScaleView& view, const Use& use) {
  if (view.scale_bytes == 1)
    use(std::integral_constant<int, 1>{});
  else if (view.scale_bytes == 4)
    use(std::integral_constant<int, 4>{});
  else
    use(std::integral_constant<int, 2>{});
}

// Calls use(load). load(block, value, code) reads what RawScale holds, without a branch on the form.
template <class Use>
__device__ __forceinline__ void with_scale_loader(const ScaleView& view, const Use& use) {
  const auto load_nested = [&](int64_t block, int64_t nested, float& value, uint32_t& code) {
    code = __ldg(view.scales.codes() + block);
    value = __ldg(view.scales.nested_absmax + nested);
  };
  if (view.scales.form == ScaleForm::kFloat32)
    use([&](int64_t block, float& value, uint32_t&) { value = __ldg(view.scales.floats() + block); });
  else if (view.nested_shift >= 0)
    use([&](int64_t block, float& value, uint32_t& code) {
      load_nested(block, block >> view.nested_shift, value, code);
    });
  else if (view.scales.nested_absmax != nullptr)
    use([&](int64_t block, float& value, uint32_t& code) {
      load_nested(block, block / view.scales.nested_block_size, value, code);
    });
  else if (view.scale_bytes == 1)
    use([&](int64_t block, float& value, uint32_t& code) {
      code = __ldg(view.scales.codes() + block);
      value = 1.0f;
    });
  else
    use([&](int64_t block, float&, uint32_t& code) { code = __ldg(scale_halves(view) + block); });
}

// Decodes a scale from its code. `value_of(code)` looks up the code's value. The format prescribes the two roundings.
template <class Lookup>
__device__ __forceinline__ float decode_scale_code(float value, uint32_t code, const Lookup& value_of, float offset) {
  return __fadd_rn(__fmul_rn(value_of(code), value), offset);
}
__device__ __forceinline__ float decode_scale_half(const ScaleView& view, uint32_t bits) {
  return widen_half(view.scales.form == ScaleForm::kBFloat16, bits);
}

// Calls use(decode). decode(value, code) decodes what RawScale holds, without a branch on the form. `offset` is the
// nested offset.
template <class Lookup, class Use>
__device__ __forceinline__ void with_scale_decoder(const ScaleView& view, const Lookup& value_of, float offset,
                                                   const Use& use) {
  if (view.scales.form == ScaleForm::kFloat32)
    use([](float value, uint32_t) { return value; });
  else if (view.scale_bytes == 1)
    use([&](float value, uint32_t code) { return decode_scale_code(value, code, value_of, offset); });
  else
    use([&](float, uint32_t code) { return decode_scale_half(view, code); });
}

template <class Lookup>
__device__ __forceinline__ float decode_scale_by(const ScaleView& view, float value, uint32_t code,
                                                 const Lookup& value_of, float offset) {
  if (view.scale_bytes == 1) return decode_scale_code(value, code, value_of, offset);
  return view.scales.form == ScaleForm::kFloat32 ? value : decode_scale_half(view, code);
}
// Decodes a scale of any form. `scale_values` is the map in shared memory, `offset` the nested offset.
__device__ __forceinline__ float decode_scale(const ScaleView& view, RawScale raw, const float* scale_values,
                                              float offset) {
  return decode_scale_by(view, raw.value, raw.code, [&](uint32_t code) { return scale_values[code]; }, offset);
}

// Reads a scale in one step.
__device__ __forceinline__ float read_scale(const ScaleView& view, int64_t block, const float* scale_values,
                                            float offset) {
  if (view.scales.form == ScaleForm::kFloat32) return __ldg(view.scales.floats() + block);
  float factor = 1.0f;
  if (view.nested_shift >= 0)
    factor = __ldg(view.scales.nested_absmax + (block >> view.nested_shift));
  else if (view.scales.nested_absmax != nullptr)
    factor = __ldg(view.scales.nested_absmax + block / view.scales.nested_block_size);
  else if (view.scale_bytes == 2)
    return decode_scale_half(view, __ldg(scale_halves(view) + block));
  const auto value_of = [&](uint32_t code) { return scale_values[code]; };
  return decode_scale_code(factor, __ldg(view.scales.codes() + block), value_of, offset);
}

// Where there is no nested offset, this returns -0, because adding it changes no number. A caller may pass a `zero`
// that the compiler cannot know to be 0, so that it cannot tell that all lanes load the same address.
__device__ __forceinline__ float nested_offset(const ScaleView& view, unsigned zero = 0) {
  return view.scales.nested_offset == nullptr ? -0.0f : __ldg(view.scales.nested_offset + zero);
}

// The value of 8-bit scale code `code`.
__device__ __forceinline__ float scale_value(const ScaleView& view, int code) {
  return view.scales.table == nullptr ? c_dynamic8.value[code] : __ldg(view.scales.table + code);
}

// Fills the map from codes to their values, where at(code) is the place of a code's value. Call from all threads of the
// CTA, and synchronize afterwards.
template <int kThreads, class At>
__device__ __forceinline__ void fill_scale_values_at(const ScaleView& view, const At& at) {
  static_assert(kThreads >= 256);
  if (kThreads == 256 || threadIdx.x < 256) *at(threadIdx.x) = scale_value(view, threadIdx.x);
}
template <int kThreads>
__device__ __forceinline__ void fill_scale_values(const ScaleView& view, float* scale_values) {
  fill_scale_values_at<kThreads>(view, [&](int code) { return scale_values + code; });
}

struct RawOffset {
  uint32_t bits = 0;
  float unit = 0.0f;
};

// Requires a weight with offsets.
__device__ __forceinline__ RawOffset load_offset(const ScaleView& view, int64_t block) {
  const Offsets& offsets = view.scales.offsets;
  RawOffset raw;
  if (view.offset_bytes == 1) {
    raw.bits = __ldg(static_cast<const uint8_t*>(offsets.stored) + block);
    if (offsets.unit != nullptr) raw.unit = __ldg(offsets.unit + nested_block(view, block));
  } else if (view.offset_bytes == 2) {
    raw.bits = __ldg(static_cast<const uint16_t*>(offsets.stored) + block);
  } else {
    raw.bits = __ldg(static_cast<const uint32_t*>(offsets.stored) + block);
  }
  return raw;
}

// Decodes the offset that is added after scaling. Zero points are subtracted before scaling, and for them this is -0,
// because adding it changes no number.
__device__ __forceinline__ float decode_offset(const ScaleView& view, RawOffset raw) {
  switch (view.scales.offsets.form) {
    case OffsetForm::kFloat32:
      return __uint_as_float(raw.bits);
    case OffsetForm::kFloat16:
    case OffsetForm::kBFloat16:
      return widen_half(view.scales.offsets.form == OffsetForm::kBFloat16, raw.bits);
    case OffsetForm::kScaled8:
      return -__fmul_rn(static_cast<float>(raw.bits), raw.unit);
    default:
      return -0.0f;
  }
}

__device__ __forceinline__ bool has_zero_points(const ScaleView& view) {
  return view.scales.offsets.form == OffsetForm::kZeroPoint8;
}

// Decodes the weights of a block with an offset or a zero point of any form, to the bits that the format prescribes.
struct BlockDecoder {
  float scale, zero_point, offset;

  __device__ __forceinline__ BlockDecoder(const ScaleView& view, int64_t block, float scale) : scale(scale) {
    const RawOffset raw = load_offset(view, block);
    zero_point = has_zero_points(view) ? static_cast<float>(raw.bits) : 0.0f;
    offset = decode_offset(view, raw);
  }
  __device__ __forceinline__ float operator()(float value) const {
    return __fadd_rn(__fmul_rn(__fsub_rn(value, zero_point), scale), offset);
  }
};

// Kernels that round weights to 16 bits compute value * scale + offset also for zero points. Returns that offset.
__device__ __forceinline__ float product_offset(const ScaleView& view, RawOffset raw, float scale) {
  return has_zero_points(view) ? -__fmul_rn(static_cast<float>(raw.bits), scale) : decode_offset(view, raw);
}

// Returns the scale and the offset for such kernels. With a zero point, the scale keeps 20 significant bits. Its
// products with integers up to 15 are then exact, so that weights whose value is the zero point are 0 in one rounding,
// too.
__device__ __forceinline__ ScaleAndOffset decode_scale_and_offset(const ScaleView& view, float scale, RawOffset raw) {
  if (!has_zero_points(view)) return {scale, decode_offset(view, raw)};
  scale = __uint_as_float(__float_as_uint(scale) & 0xFFFFFFF0u);
  return {scale, -__fmul_rn(static_cast<float>(raw.bits), scale)};
}

// Computes value * scale + offset, in one rounding if it has the bits of two (fuses_offset).
template <bool kFused>
__device__ __forceinline__ float scale_and_add(float value, float scale, float offset) {
  return kFused ? fmaf(value, scale, offset) : __fadd_rn(__fmul_rn(value, scale), offset);
}

// Whether value * scale is exact, or nothing but -0 is added to it. Of Q4_K (kScaled8) it is, because the scales of
// files are products of 6 and 11 bits. Scales of other origin make the float32 result differ in its last bits.
__device__ __forceinline__ bool fuses_offset(const ScaleView& view) {
  return view.exact_products || view.offset_bytes <= 1;
}

// Calls use(has_offsets) with a constant, for kernels that are compiled with and without offsets.
template <class Use>
__device__ __forceinline__ void with_offsets(const ScaleView& view, const Use& use) {
  if (view.scales.offsets)
    use(std::true_type{});
  else
    use(std::false_type{});
}

}  // namespace qlora::tile
