// The words of the vocabulary panel:: for weight rows side by side in plain C++, the definition of what the kernel of
// int8 for few tokens asks for.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/packing.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// Lane r of out[j] is dword j of the 4 * kRowDwords bytes at p + r * stride: floats, or eight packed weights each.
// Where instructions multiply matrices, an overload for bytes keeps the dwords of a row that meet in one together.
inline constexpr int kRowDwords = 4;
inline void load_rows(const void* p, int64_t stride, F (&out)[kRowDwords]) {
  for (int j = 0; j < kRowDwords; ++j)
    for (int r = 0; r < kLanes; ++r)
      __builtin_memcpy(&out[j].lane[r], static_cast<const char*>(p) + r * stride + 4 * j, 4);
}

// The codes of the weights with even and with odd numbers among the eight of each lane. `packed`
// points to as many vectors as words are multiplied at once (kRows).
inline void decode_eight(const WordInt8::Values& values, const F* packed, WordInt8::Vector& even,
                         WordInt8::Vector& odd) {
  uint8_t byte[4 * kLanes];
  __builtin_memcpy(byte, packed->lane, sizeof(byte));
  for (int i = 0; i < 4 * kLanes; ++i) {
    even.byte[i] = values.value[byte[i] >> 4];
    odd.byte[i] = values.value[byte[i] & 15];
  }
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
