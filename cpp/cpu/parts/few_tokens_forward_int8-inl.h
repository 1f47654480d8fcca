// The forward of few tokens in int8.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward_int8-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kFewTokensInt8>(const Pool& pool, const LinearProblem& p) {
  return few_tokens_int8::forward(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
