// many_tokens_float: dX, every element multiplied in float32.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dx-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

inline Outcome dx_float(const Pool& pool, const LinearDxProblem& p) {
  switch (p.dtype) {
    case DType::kBFloat16:
      dx<WordF32, bfloat16>(pool, p);
      break;
    case DType::kFloat16:
      dx<WordF32, float16>(pool, p);
      break;
    default:
      dx<WordF32, float>(pool, p);
  }
  return Outcome::kDone;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
