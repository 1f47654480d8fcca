// many_tokens_int8 in a tile unit.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/linear_int8-inl.h"
#include "cpp/cpu/many_tokens_tiles/multiply_int8-inl.h"
#include "cpp/cpu/many_tokens_tiles/word_bf16-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

inline Outcome forward_int8(const Pool& pool, const LinearProblem& p) {
  many_tokens::with_low_rank_word<TileWordBf16>(
      p, [&]<class W, class T>(W*, T*) { many_tokens::forward_int8_as<TileWordInt8, W, T>(pool, p); });
  return Outcome::kDone;
}
inline Outcome dx_int8(const Pool& pool, const LinearDxProblem& p) {
  many_tokens::with_low_rank_word<TileWordBf16>(
      p, [&]<class W, class T>(W*, T*) { many_tokens::dx_int8_as<TileWordInt8, W, T>(pool, p); });
  return Outcome::kDone;
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
