// The forward and dX of few tokens for weights with offsets.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/dx_float-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run_with_offsets<Kernel::kFewTokensInt>(const Pool& pool, const LinearProblem& p) {
  return few_tokens::forward_int<true>(pool, p);
}
template <>
Outcome run_with_offsets<Kernel::kFewTokensFloat>(const Pool& pool, const LinearProblem& p) {
  return few_tokens::forward_float<true>(pool, p);
}
template <>
Outcome run_with_offsets<Kernel::kFewTokensFloat>(const Pool& pool, const LinearDxProblem& p) {
  return few_tokens::dx_float<true>(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
