// many_tokens_int8 in a tile unit.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dx_int8-inl.h"
#include "cpp/cpu/many_tokens/forward_int8-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#include "cpp/cpu/many_tokens_tiles/multiply_int8-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

// Low-rank products are in float32 for all types: the processors that have a tile unit multiply pairs of bfloat16 half
// as fast.
template <class Run>
void with_element(DType dtype, const Run& run) {
  if (dtype == DType::kFloat32) {
    run(static_cast<float*>(nullptr));
  } else if (dtype == DType::kFloat16) {
    run(static_cast<float16*>(nullptr));
  } else {
    run(static_cast<bfloat16*>(nullptr));
  }
}

inline Outcome forward_int8(const Pool& pool, const LinearProblem& p) {
  with_element(p.dtype,
               [&]<class T>(T*) { many_tokens::forward_int8_as<TileWordInt8, many_tokens::WordF32, T>(pool, p); });
  return Outcome::kDone;
}
inline Outcome dx_int8(const Pool& pool, const LinearDxProblem& p) {
  with_element(p.dtype, [&]<class T>(T*) { many_tokens::dx_int8_as<TileWordInt8, many_tokens::WordF32, T>(pool, p); });
  return Outcome::kDone;
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
