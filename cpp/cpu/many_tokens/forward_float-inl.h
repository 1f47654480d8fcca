// many_tokens_float: the forward, every element multiplied in float32.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/forward-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

inline Outcome forward_float(const Pool& pool, const LinearProblem& p) {
  with_type(p.dtype, [&]<class T>() { forward<WordF32, T>(pool, p); });
  return Outcome::kDone;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
