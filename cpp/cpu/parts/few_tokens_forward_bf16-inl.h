// The forward of few tokens in pairs of bfloat16.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward_bf16-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kFewTokensBf16>(const Pool& pool, const LinearProblem& p) {
  return few_tokens::forward_bf16(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
