// The forward of few tokens. The integer kernel falls back to float32 for some tokens.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

Outcome forward_few_tokens_int(const Pool& pool, const LinearProblem& p) { return few_tokens::forward_int(pool, p); }
Outcome forward_few_tokens_float(const Pool& pool, const LinearProblem& p) {
  return few_tokens::forward_float(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
