// The forward of few tokens in float32.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kFewTokensFloat>(const Pool& pool, const LinearProblem& p) {
  if (is_wide(p.w.code)) return run_wide(pool, p);
  if (p.w.scales.offsets) return run_with_offsets<Kernel::kFewTokensFloat>(pool, p);
  return few_tokens::forward_float<false>(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
