// The forward and dX of many tokens in int8, in a tile unit.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens_tiles/linear_int8-inl.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kManyTokensInt8>(const Pool& pool, const LinearProblem& p) {
  return many_tokens_tiles::forward_int8(pool, p);
}
template <>
Outcome run<Kernel::kManyTokensInt8>(const Pool& pool, const LinearDxProblem& p) {
  return many_tokens_tiles::dx_int8(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
