// many_tokens_int8: the forward and dX with activations rounded to int8, by type and by the words that suit them.
#pragma once

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dx_int8-inl.h"
#include "cpp/cpu/many_tokens/forward_int8-inl.h"
#include "cpp/cpu/many_tokens/in_range-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

template <bool has_bf16_words>
struct LowRankWord {
  using Type = WordF32;
};
template <>
struct LowRankWord<true> {
  using Type = panel::WordBf16;
};

// Whether the low-rank products of x or dy can be multiplied in pairs of bfloat16, where the set does that.
inline bool low_rank_in_range(const LinearProblem& p) { return in_range(p.x, p.m, p.w.k); }
inline bool low_rank_in_range(const LinearDxProblem& p) { return in_range(p.dy, p.m, p.w.n); }

// Calls run(word, element) with null pointers to the word of low-rank products, which is Pairs where these can be
// multiplied as pairs of bfloat16, and to the type of x.
template <class Pairs, class Problem, class Run>
void with_low_rank_word(const Problem& p, const Run& run) {
  if (p.dtype == DType::kFloat32) {
    run(static_cast<WordF32*>(nullptr), static_cast<float*>(nullptr));
  } else if (p.dtype == DType::kFloat16) {
    run(static_cast<WordF32*>(nullptr), static_cast<float16*>(nullptr));
  } else if (Pairs::kElements == 2 && p.lora.rank && !low_rank_in_range(p)) {
    run(static_cast<WordF32*>(nullptr), static_cast<bfloat16*>(nullptr));
  } else {
    run(static_cast<Pairs*>(nullptr), static_cast<bfloat16*>(nullptr));
  }
}

inline Outcome forward_int8(const Pool& pool, const LinearProblem& p) {
  with_low_rank_word<LowRankWord<panel::kHasBf16Words>::Type>(p, [&]<class W, class T>(W*, T*) {
    panel::with_int8_word(int8_codes(p.w.code), blocks_per_segment(p.w),
                          [&]<class B>(B) { forward_int8_as<B, W, T>(pool, p); });
  });
  return Outcome::kDone;
}
inline Outcome dx_int8(const Pool& pool, const LinearDxProblem& p) {
  with_low_rank_word<LowRankWord<panel::kHasBf16Words>::Type>(p, [&]<class W, class T>(W*, T*) {
    panel::with_int8_word(int8_codes(p.w.code), 1, [&]<class B>(B) { dx_int8_as<B, W, T>(pool, p); });
  });
  return Outcome::kDone;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
