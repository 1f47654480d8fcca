// few_tokens_bf16: the forward where the processor multiplies pairs of bfloat16.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/code_tables.h"
#include "cpp/cpu/few_tokens/forward-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

// bfloat16 as it is, times codes rounded to bfloat16, which costs less than rounding w would, for every x
// (code_tables.h).
struct Bf16Products {
  using X = int16_t;
  static constexpr int kMaxTokens = kMaxIntTokens, kMaxPairedTokens = kMaxPairedIntTokens;
  static constexpr bool kMayOverflow = false;

  IntCodebook book{kBf16Codes.value};
  using Codes = IntCodes;
  Codes codes(Ints chunk) const { return decode(chunk, book, LaneOrder{}); }

  template <int kRows>
  static void multiply(const Codes (&codes)[kRows], const X* x, Floats (&product)[kRows]) {
    unroll<kRows>([&](auto w) { product[w] = zero(); });
    unroll<4>([&](auto s) {
      const int16_t* const at = x + s * 2 * kLanes;
      const Ints x_s = kRows > 1 ? load_pairs_once(at) : load_pairs(at);
      unroll<kRows>([&](auto w) { product[w] = dot_bf16(product[w], codes[w].v[s], x_s); });
    });
  }

  // Multiplied by the power of two that takes the largest value to 2^-8, since the dot product knows no subnormals, and
  // its sums times a scale of W should not overflow where y does not.
  static bool arrange(const float* x, int64_t chunks, int64_t stride, X* out, float* scale) {
    const uint32_t bits = largest_bits(x, chunks * kChunk);
    const bool as_it_is = bits == 0 || bits >= kInfinityBits;
    int exponent = as_it_is ? 0 : __builtin_ilogbf(bits_float(bits)) + 8;
    if (exponent > 126) exponent = 126;  // of a float32
    // In two steps, for the smallest subnormal needs a factor of 2^125 and more.
    const Floats half = splat(__builtin_ldexpf(1.0f, -(exponent / 2)));
    const Floats rest = splat(__builtin_ldexpf(1.0f, exponent / 2 - exponent));
    for (int64_t c = 0; c < chunks; ++c) {
      Ints halves[kLaneWeights];
      for (int i = 0; i < kLaneWeights; ++i)
        halves[i] = upper_halves(mul(mul(load(x + c * kChunk + i * kLanes), half), rest));
      store_in_code_order(halves, out + c * stride, LaneOrder{});
    }
    *scale = static_cast<float>(__builtin_ldexp(1.0 / kBf16Codes.per_one, exponent));
    return true;
  }
};

inline Outcome forward_bf16(const Pool& pool, const LinearProblem& p) {
  return forward<bfloat16, Bf16Products>(pool, p);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
