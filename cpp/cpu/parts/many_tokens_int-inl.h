// The forward and dX of many tokens in integers.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dx_int-inl.h"
#include "cpp/cpu/many_tokens/forward_int-inl.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kManyTokensInt>(const Pool& pool, const LinearProblem& p) {
  return many_tokens::forward_int(pool, p);
}
template <>
Outcome run<Kernel::kManyTokensInt>(const Pool& pool, const LinearDxProblem& p) {
  return many_tokens::dx_int(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
