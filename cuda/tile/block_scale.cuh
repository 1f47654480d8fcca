// The scale of a quantization block, float32 or nested, in two parts: `load` only reads memory, so that it can be
// issued early; `decode` turns what it read into the scale.
#pragma once

#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/tile/code_tables.cuh"

namespace qlora::tile {

// Scales with the divisions that every block needs made into shifts.
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

// The nested block that holds `block`.
__device__ __forceinline__ int64_t nested_block(const ScaleView& view, int64_t block) {
  return view.nested_shift >= 0 ? block >> view.nested_shift : block / view.scales.nested_block_size;
}

struct RawScale {
  float value = 0.0f;  // absmax, or the nested block's
  uint32_t code = kDynamic8ZeroCode;
  int64_t nested = -1;  // whose absmax `value` is, when nested
};

// `raw` may hold an earlier block's scale: its nested absmax is not read again where it is the same.
__device__ __forceinline__ void reload_scale(const ScaleView& view, int64_t block, RawScale& raw) {
  if (view.scales.codes == nullptr) {
    raw.value = __ldg(view.scales.absmax + block);
    return;
  }
  raw.code = __ldg(view.scales.codes + block);
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

// `dynamic8` is the map in shared memory, `offset` the nested offset; two roundings, as the format says.
__device__ __forceinline__ float decode_scale(const ScaleView& view, RawScale raw, const float* dynamic8,
                                              float offset) {
  return view.scales.codes == nullptr ? raw.value : __fadd_rn(__fmul_rn(dynamic8[raw.code], raw.value), offset);
}

__device__ __forceinline__ float nested_offset(const ScaleView& view) {
  return view.scales.codes == nullptr ? 0.0f : __ldg(view.scales.nested_offset);
}

// Whole CTA; the caller synchronises.
template <int kThreads>
__device__ __forceinline__ void fill_dynamic8(float* dynamic8) {
  for (int i = threadIdx.x; i < 256; i += kThreads) dynamic8[i] = c_dynamic8.value[i];
}

}  // namespace qlora::tile
