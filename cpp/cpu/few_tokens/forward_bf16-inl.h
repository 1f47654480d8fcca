// few_tokens_bf16: the forward in products of bfloat16, for processors that multiply pairs of them.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/isa/bf16_pairs.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;

// x is already bfloat16, and the codes are rounded to it (Bf16CodeTable). A lane's eight products are summed before a
// scale of W multiplies them. A token is refused if its values are so small that products could be subnormal, or so
// large that sums could leave float32's range.
template <class Order>
struct Bf16Products {
  using X = int16_t;  // the bits
  static constexpr int kMaxTokens = kMaxBf16Tokens, kMaxPairedTokens = 0;
  static constexpr OffsetsEnter kOffsets = OffsetsEnter::kNothing;
  static constexpr bool kServesEveryRow = true;
  static constexpr bool kMayOverflow = true;

  explicit Bf16Products(const Weight& w) : book(bf16_codes(w.code).bits), per_one(bf16_codes(w.code).per_one) {}
  IntCodebook book;
  double per_one;  // of the codes
  using Codes = IntCodes;
  Codes codes(Chunk chunk) const { return decode(chunk, book, Order{}); }

  template <int kRows>
  static void multiply(const Codes (&codes)[kRows], const X* x, Floats (&product)[kRows]) {
    unroll<kRows>([&](auto w) { product[w] = zero(); });
    unroll<4>([&](auto s) {
      const Pairs x_s = load_pairs(x + s * 2 * kLanes);
      unroll<kRows>([&](auto w) { product[w] = dot(product[w], codes[w].v[s], x_s); });
    });
  }

  bool arrange(const Segment& segment, int64_t stride, X* out, float* scale) const {
    const float* const x = segment.x;
    const int64_t chunks = segment.chunks;
    const uint32_t bits = largest_bits(x, chunks * kChunk);
    if (bits && (bits < power_of_two_bits(-60) || bits > power_of_two_bits(60))) return false;
    *scale = static_cast<float>(1.0 / per_one);
    for (int64_t c = 0; c < chunks; ++c) {
      Ints x_bits[kLaneWeights];
      for (int i = 0; i < kLaneWeights; ++i) x_bits[i] = upper_halves(load(x + c * kChunk + i * kLanes));
      store_in_code_order(x_bits, out + c * stride, Order{});
    }
    return true;
  }
};

inline Outcome forward_bf16(const Pool& pool, const LinearProblem& p) {
  if (has_one_scale_per(32, p.w)) return forward_else_float<bfloat16, Bf16Products<HalfOrder>>(pool, p);
  return forward_else_float<bfloat16, Bf16Products<Bf16LaneOrder>>(pool, p);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
