// The forward and dX of many tokens in int8.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kManyTokensInt8>(const Pool&, const LinearProblem&) {
  return Outcome::kTooLarge;
}
template <>
Outcome run<Kernel::kManyTokensInt8>(const Pool&, const LinearDxProblem&) {
  return Outcome::kTooLarge;
}

}  // namespace qlora::cpu::QLORA_ISA::parts
