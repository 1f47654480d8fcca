// The forward of few tokens in integers, which falls back to float32 for some tokens.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward_int-inl.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kFewTokensInt>(const Pool& pool, const LinearProblem& p) {
  if (p.w.scales.offsets) return run_with_offsets<Kernel::kFewTokensInt>(pool, p);
  return few_tokens::forward_int<false>(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
