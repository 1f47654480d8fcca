// The forward of many tokens and its gradients in a tile unit.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens_tiles/linear-inl.h"
#include "cpp/cpu/parts/parts.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA::parts {

template <>
Outcome run<Kernel::kManyTokensTiles>(const Pool& pool, const LinearProblem& p) {
  return many_tokens_tiles::forward_tiles(pool, p);
}
template <>
Outcome run<Kernel::kManyTokensTiles>(const Pool& pool, const LinearDxProblem& p) {
  return many_tokens_tiles::dx_tiles(pool, p);
}
template <>
Outcome run<Kernel::kManyTokensTiles>(const Pool& pool, const LoraGradProblem& p) {
  return many_tokens_tiles::dlora_tiles(pool, p);
}

}  // namespace qlora::cpu::QLORA_ISA::parts
