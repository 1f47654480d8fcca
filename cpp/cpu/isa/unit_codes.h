// Units of 5-bit and 6-bit codes (cpp/format/packing.h) as bytes, for sets that have instructions for it: these
// specialize UnitCodes, with of(at), the codes of the units at `at` in the order of memory, four in each lane. All
// others take WideReader's own path.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

template <int kBits>
struct UnitCodes {
  static constexpr bool kServes = false;
};

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
