// many_tokens_float: LoRA's gradients, every element multiplied in float32.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dlora-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

inline Outcome dlora_float(const Pool& pool, const LoraGradProblem& p) {
  with_type(p.dtype, [&]<class T>() { dlora<WordF32, T>(pool, p); });
  return Outcome::kDone;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
