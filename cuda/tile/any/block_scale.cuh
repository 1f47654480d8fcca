// Reads the scale of a quantization block, in any of the forms in which it can be stored. There are two steps: `load`
// only reads memory, so it can be issued early, and `decode` turns what was read into the scale. Other device code
// depends on the form only if it is compiled per form (with_scale_form).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/problem.h"
#include "cuda/tile/any/code_tables.cuh"

namespace qlora::tile {

// Scales whose per-block divisions are replaced by shifts.
struct ScaleView {
  Scales scales;
  int64_t blocks = 0;
  int block_shift = 0;
  int nested_shift = -1;  // -1: nested_block_size is not a power of two
};

inline ScaleView make_scale_view(const Scales& scales, int64_t blocks) {
  ScaleView view{scales, blocks};
  while (int64_t{1} << view.block_shift < scales.block_size) ++view.block_shift;
  if (const int64_t n = scales.nested_block_size; (n & (n - 1)) == 0) {
    view.nested_shift = 0;
    while (int64_t{1} << view.nested_shift < n) ++view.nested_shift;
  }
  return view;
}

inline ScaleView make_scale_view(const Weight& w) {
  return make_scale_view(w.scales, ceil_div(w.n * w.k, w.scales.block_size));
}

// Returns the nested block that holds `block`.
__device__ __forceinline__ int64_t nested_block(const ScaleView& view, int64_t block) {
  return view.nested_shift >= 0 ? block >> view.nested_shift : block / view.scales.nested_block_size;
}

struct RawScale {
  float value = 0.0f;  // absmax, or the nested block's absmax
  uint32_t code = kDynamic8ZeroCode;
  int64_t nested = -1;  // the nested block whose absmax `value` is
};

// Loads the scale of `block` into `raw`, which may hold an earlier block's scale. A nested absmax is not read again if
// both blocks share it.
__device__ __forceinline__ void reload_scale(const ScaleView& view, int64_t block, RawScale& raw) {
  if (view.scales.form == ScaleForm::kFloat32) {
    raw.value = __ldg(view.scales.floats() + block);
    return;
  }
  raw.code = __ldg(view.scales.codes() + block);
  if (const int64_t nested = nested_block(view, block); nested != raw.nested) {
    raw.nested = nested;
    raw.value = __ldg(view.scales.nested_absmax + nested);
  }
}

__device__ __forceinline__ RawScale load_scale(const ScaleView& view, int64_t block) {
  RawScale raw;
  reload_scale(view, block, raw);
  return raw;
}

// Calls use(form) with the form as a constant, for kernels that are compiled per form.
template <class Use>
__device__ __forceinline__ void with_scale_form(const ScaleView& view, const Use& use) {
  if (view.scales.form == ScaleForm::kNested8)
    use(std::integral_constant<ScaleForm, ScaleForm::kNested8>{});
  else
    use(std::integral_constant<ScaleForm, ScaleForm::kFloat32>{});
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
  else
    use([&](int64_t block, float& value, uint32_t& code) {
      load_nested(block, block / view.scales.nested_block_size, value, code);
    });
}

// Decodes a nested scale. `dynamic8(code)` looks up the map. The format prescribes the two roundings.
template <class Lookup>
__device__ __forceinline__ float decode_nested_scale(float value, uint32_t code, const Lookup& dynamic8, float offset) {
  return __fadd_rn(__fmul_rn(dynamic8(code), value), offset);
}
template <class Lookup>
__device__ __forceinline__ float decode_scale_by(const ScaleView& view, float value, uint32_t code,
                                                 const Lookup& dynamic8, float offset) {
  return view.scales.form == ScaleForm::kFloat32 ? value : decode_nested_scale(value, code, dynamic8, offset);
}
// Decodes a scale of any form. `dynamic8` is the map in shared memory, `offset` the nested offset.
__device__ __forceinline__ float decode_scale(const ScaleView& view, RawScale raw, const float* dynamic8,
                                              float offset) {
  return decode_scale_by(view, raw.value, raw.code, [&](uint32_t code) { return dynamic8[code]; }, offset);
}

__device__ __forceinline__ float nested_offset(const ScaleView& view) {
  return view.scales.form == ScaleForm::kFloat32 ? 0.0f : __ldg(view.scales.nested_offset);
}

// Fills the map. Call from all threads of the CTA, and synchronize afterwards.
template <int kThreads>
__device__ __forceinline__ void fill_dynamic8(float* dynamic8) {
  for (int i = threadIdx.x; i < 256; i += kThreads) dynamic8[i] = c_dynamic8.value[i];
}

}  // namespace qlora::tile
