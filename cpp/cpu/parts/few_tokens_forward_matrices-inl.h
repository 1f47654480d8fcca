// The forward of few tokens in integers, by matrices of bytes.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward_matrices-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kFewTokensInt>(const Pool& pool, const LinearProblem& p) {
  return few_tokens::forward_matrices(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
