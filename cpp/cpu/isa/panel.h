// The vocabulary panel:: of the instruction set that is being compiled, which fills panels and multiplies them.
// isa/scalar/panel.h is its definition in plain C++. Here is what follows from any set's names.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/scales.h"

#include QLORA_ISA_HEADER(panel.h)

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// What the codes decode to under a block's scale, or its scale and offset.
inline auto decoded_table(const Table& values, float scale) { return scaled(values, splat(scale)); }
inline auto decoded_table(const Table& values, ScaleAndOffset block) {
  return add_offset(scaled(values, splat(block.scale)), splat(block.offset));
}

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
