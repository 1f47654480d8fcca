// many_tokens_bf16: the forward and its gradients where the processor multiplies pairs of bfloat16.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dlora-inl.h"
#include "cpp/cpu/many_tokens/dx-inl.h"
#include "cpp/cpu/many_tokens/forward-inl.h"
#include "cpp/cpu/many_tokens/in_range-inl.h"
#include "cpp/cpu/shared/instruction_set.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

inline Outcome forward_bf16(const Pool& pool, const LinearProblem& p) {
  if (!in_range(pool, p)) return Outcome::kOutOfRange;
  forward<panel::WordBf16, bfloat16>(pool, p);
  return Outcome::kDone;
}
inline Outcome dx_bf16(const Pool& pool, const LinearDxProblem& p) {
  if (!in_range(pool, p)) return Outcome::kOutOfRange;
  dx<panel::WordBf16, bfloat16>(pool, p);
  return Outcome::kDone;
}
inline Outcome dlora_bf16(const Pool& pool, const LoraGradProblem& p) {
  if (!in_range(pool, p)) return Outcome::kOutOfRange;
  dlora<panel::WordBf16, bfloat16>(pool, p);
  return Outcome::kDone;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
