// few_tokens_float: the forward in float32.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/arrange-inl.h"
#include "cpp/cpu/few_tokens/forward-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/shared/with_type-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

// float32 products, which are exact but for float32's own roundings. With offsets each weight is decoded before it is
// multiplied: where weights are zero, the products of their values and of their offsets would cancel only nearly.
template <bool kHasOffsets>
struct FloatProducts {
  using X = float;
  static constexpr OffsetsEnter kOffsets = kHasOffsets ? OffsetsEnter::kCodes : OffsetsEnter::kNothing;
  static constexpr int kMaxTokens = kMaxFloatTokens, kMaxPairedTokens = 0;
  static constexpr bool kServesEveryRow = true;
  static constexpr bool kMayOverflow = false;

  explicit FloatProducts(const Weight& w) : book(w.table().value) {}
  FloatCodebook book;
  using Codes = FloatCodes;
  Codes codes(Chunk chunk) const { return decode(chunk, book); }
  Codes codes(Chunk chunk, Floats scale, Floats offset) const {
    Codes weights = codes(chunk);
    unroll<kLaneWeights>([&](auto s) { weights.v[s] = add(mul(weights.v[s], scale), offset); });
    return weights;
  }

  template <int kRows>
  static void multiply(const Codes (&codes)[kRows], const X* x, Floats (&product)[kRows]) {
    unroll<kRows>([&](auto w) {
      product[w] = mul(codes[w].v[0], load(x));
      unroll<kLaneWeights - 1>(
          [&](auto s) { product[w] = fma(codes[w].v[s + 1], load(x + (s + 1) * kLanes), product[w]); });
    });
  }

  bool arrange(const Segment& segment, int64_t stride, X* out, float* scale) const {
    const float* const x = segment.x;
    const int64_t chunks = segment.chunks;
    // Eight products are summed before a scale of W makes them small, so a segment with huge values is scaled down.
    const uint32_t bits = largest_bits(x, chunks * kChunk);
    const bool huge = bits > power_of_two_bits(100) && bits < kInfinityBits;
    const float factor = huge ? 0x1p-20f : 1.0f;
    for (int64_t c = 0; c < chunks; ++c)
      for (int s = 0; s < kLaneWeights; ++s)
        for (int lane = 0; lane < kLanes; ++lane)
          out[c * stride + s * kLanes + lane] = x[c * kChunk + lane * kLaneWeights + (s ^ 1)] * factor;
    *scale = 1.0f / factor;
    return true;
  }
};

template <bool kHasOffsets>
Outcome forward_float(const Pool& pool, const LinearProblem& p) {
  return with_type(p.dtype, [&]<class T>() { return forward<T, FloatProducts<kHasOffsets>>(pool, p); });
}

// The forward with Products that may refuse a token, of a call whose first token is `first_token`. Tokens do not depend
// on each other's values, so each run of refused tokens is a problem of its own: fallback(problem, its first token).
template <class T, class Products, class Fallback>
Outcome forward_else(const Pool& pool, const LinearProblem& p, int64_t first_token, const Fallback& fallback) {
  if (first_token + p.m > FallbackTokens::kMax) return Outcome::kTooLarge;
  FallbackTokens fallback_tokens;
  Outcome outcome = forward<T, Products>(pool, p, first_token, &fallback_tokens);
  for (int64_t first = 0, end; outcome == Outcome::kDone && first < p.m; first = end) {
    end = first + 1;
    if (!fallback_tokens.contains(first_token + first)) continue;
    while (end < p.m && fallback_tokens.contains(first_token + end)) ++end;
    outcome = fallback(tokens_of<T>(p, first, end - first), first_token + first);
  }
  return outcome;
}
// The same, where refused tokens fall back to float32.
template <class T, class Products>
Outcome forward_else_float(const Pool& pool, const LinearProblem& p, int64_t first_token = 0) {
  return forward_else<T, Products>(pool, p, first_token, [&](const LinearProblem& refused, int64_t first) {
    return forward<T, FloatProducts<Products::kOffsets != OffsetsEnter::kNothing>>(pool, refused, first);
  });
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
