// The forward of many tokens and its gradients in pairs of bfloat16.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/linear_bf16-inl.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kManyTokensBf16>(const Pool& pool, const LinearProblem& p) {
  return many_tokens::forward_bf16(pool, p);
}
template <>
Outcome run<Kernel::kManyTokensBf16>(const Pool& pool, const LinearDxProblem& p) {
  return many_tokens::dx_bf16(pool, p);
}
template <>
Outcome run<Kernel::kManyTokensBf16>(const Pool& pool, const LoraGradProblem& p) {
  return many_tokens::dlora_bf16(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
