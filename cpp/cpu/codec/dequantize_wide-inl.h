// Decodes weights of wide codes.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/scales-inl.h"
#include "cpp/cpu/codec/wide_reader-inl.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {

// Decodes elements begin .. end - 1 to `out`, which begins there. They are at most kDecodedWide.
inline constexpr int64_t kDecodedWide = 4096;
template <int kBits, WideCode::Kind kind, class T>
void dequantize_wide_part(const Weight& w, int64_t begin, int64_t end, T* out) {
  using Reader = WideReader<panel::kLanes>;
  const Reader reader(w);
  const int64_t size = w.scales.block_size, block = begin / size, blocks = ceil_div(end, size) - block;
  constexpr int64_t kRoom = kDecodedWide / kMinBlockSize + Reader::kGroup;
  // A zero point is subtracted from the code, before the scale multiplies.
  const bool has_zero_points = w.scales.offsets.form == OffsetForm::kZeroPoint8;
  const int64_t to_offset = w.scales.offsets ? kRoom : 0;
  float scales[2 * kRoom] = {}, ones[2 * kRoom];
  read_scales(w.scales, block, blocks, scales);
  if (has_zero_points) {
    for (float& one : ones) one = 1.0f;
    read_zero_points(w.scales, block, blocks, ones + kRoom);
  } else {
    read_offsets(w.scales, block, blocks, scales, scales + kRoom);
  }
  for (int64_t i = begin; i < end; i += Reader::kGroup) {
    const int64_t of_block = i / size - block;
    typename Reader::Floats v[4];
    reader.template decode<kBits, kind>(i, (has_zero_points ? ones : scales) + of_block, to_offset, v);
    if (has_zero_points) {
      const auto by = reader.of_lanes(scales + of_block);
      for (auto& x : v) x *= by;
    }
    panel::F in_order[4];
    static_assert(sizeof v == sizeof in_order);
    __builtin_memcpy(in_order, v, sizeof v);
    panel::decoded_to_memory_order(in_order);
    T* const to = out + (i - begin);
    for (int j = 0; j < 4; ++j) {
      const int64_t left = end - i - j * panel::kLanes;
      if (left >= panel::kLanes) {
        panel::store(to + j * panel::kLanes, in_order[j]);
      } else if (left > 0) {
        panel::store_first(to + j * panel::kLanes, in_order[j], static_cast<int>(left));
      }
    }
  }
}

template <class T>
void dequantize_wide(const Pool& pool, const Weight& w, T* out) {
  const int64_t numel = w.n * w.k;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kDecodedWide;
      with_wide(wide_code(w.code), [&]<int kBits, WideCode::Kind kind>() {
        dequantize_wide_part<kBits, kind>(w, first, min(first + kDecodedWide, numel), out + first);
      });
    }
  };
  pool(ceil_div(numel, kDecodedWide), 4, body);
}

}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
