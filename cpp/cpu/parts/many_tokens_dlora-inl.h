// LoRA's gradients of many tokens in float32.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dlora_float-inl.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kManyTokensFloat>(const Pool& pool, const LoraGradProblem& p) {
  return many_tokens::dlora_float(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
