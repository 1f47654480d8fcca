// many_tokens_tiles: the forward and its gradients where the processor has a tile unit.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/many_tokens/in_range-inl.h"
#include "cpp/cpu/many_tokens_tiles/dlora-inl.h"
#include "cpp/cpu/many_tokens_tiles/dx-inl.h"
#include "cpp/cpu/many_tokens_tiles/forward-inl.h"
#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

inline Outcome forward_tiles(const Pool& pool, const LinearProblem& p) {
  if (!many_tokens::in_range(pool, p)) return Outcome::kOutOfRange;
  forward(pool, p);
  return Outcome::kDone;
}
inline Outcome dx_tiles(const Pool& pool, const LinearDxProblem& p) {
  if (!many_tokens::in_range(pool, p)) return Outcome::kOutOfRange;
  dx(pool, p);
  return Outcome::kDone;
}
inline Outcome dlora_tiles(const Pool& pool, const LoraGradProblem& p) {
  if (!many_tokens::in_range(pool, p)) return Outcome::kOutOfRange;
  dlora(pool, p);
  return Outcome::kDone;
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
