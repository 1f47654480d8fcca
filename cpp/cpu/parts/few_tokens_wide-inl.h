// The forward and dX of few tokens for weights of wide codes.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/wide-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

Outcome run_wide(const Pool& pool, const LinearProblem& p) { return few_tokens::forward_wide(pool, p); }
Outcome run_wide(const Pool& pool, const LinearDxProblem& p) { return few_tokens::dx_wide(pool, p); }

}  // namespace qlora::cpu::QLORA_ISA::parts
