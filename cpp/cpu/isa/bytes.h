// The words of the vocabulary panel:: for int8. isa/scalar/bytes.h is their definition in plain C++.
#pragma once

#include "cpp/cpu/shared/instruction_set.h"

#include QLORA_ISA_HEADER(bytes.h)

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace panel {

// The word of bfloat16 pairs, of the sets that multiply these (kHasBf16Words).
struct WordBf16;

}  // namespace panel
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
