// few_tokens_int: the forward in integers. Tokens that integers cannot serve fall back to float32.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/forward-inl.h"
#include "cpp/cpu/few_tokens/forward_float-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
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

// What decodes first weights (FirstWeights) to float32. Only weights with offsets need it.
template <bool kHasOffsets>
struct FirstWeightsBook {
  explicit FirstWeightsBook(const float*) {}
};
template <>
struct FirstWeightsBook<true> {
  explicit FirstWeightsBook(const float* value) : float_book(value) {}
  FloatCodebook float_book;
};

// x is rounded to 15 bits of the largest value of its segment and multiplied by 13-bit integer codes. A lane's eight
// products are summed exactly in int32, which is an eighth of the work of decoding to float32.
//
// The root mean square error of one product x w is
//
//   allowed    a rounding of w to T: 0.42 units of 2^-8 (bfloat16) or 2^-11 (float16) of |x w|
//   here       0.29 steps of largest / 32767 in x, times |w|: the same for a small x as for a large one
//
// So rounding x is accurate enough if most values are at least largest / kSpread<T>. In the worst case that is_even
// accepts, 5/8 of the values are just as small and the others are near zero. Then the mean square error of a segment
// is 7.6e-11, where 9.6e-11 is allowed, in units of largest² w² per value. Numbers from N(0, 1), the largest of 1024 of
// which is 3 to 5, are far from that. A segment with an outlier is refused, and so is one whose values are so small or
// large that factors would leave float32's range.
//
// Where the integers are the values exactly, products of float16 have next to no rounding of w to hide behind: only y
// is rounded, by 0.42 units of 2^-11. There the steps of x must be small beside its root mean square too (kMaxPeak).
//
// These are sums over many products. If a few weights decide the sum of a row, these may meet small x, so such rows are
// summed in float32 (verdict/rows-inl.h). README.md has what is promised of a single entry.
//
// With offsets, an offset is multiplied by the sum of the same rounded x. As both products have the same roundings of
// x, their error is that of x times the whole weight, also where value and offset nearly cancel.
template <class T, class Order, bool kHasOffsets, int kLargestX = 32767>
struct IntProducts : FirstWeightsBook<kHasOffsets> {
  using X = int16_t;
  static constexpr OffsetsEnter kOffsets = kHasOffsets ? OffsetsEnter::kSums : OffsetsEnter::kNothing;
  static constexpr int kMaxTokens = kMaxIntTokens, kMaxPairedTokens = kMaxPairedIntTokens;
  static constexpr bool kServesEveryRow = false;
  static constexpr bool kMayOverflow = true;

  explicit IntProducts(const Weight& w)
      : FirstWeightsBook<kHasOffsets>(w.table().value),
        book(int_codes(w.code).value),
        per_one(int_codes(w.code).per_one),
        limits_peak(kMantissaBits<T> > 7 && int_codes(w.code).exact) {}
  IntCodebook book;
  double per_one;  // of the codes
  bool limits_peak;
  using Codes = IntCodes;
  Codes codes(Chunk chunk) const { return decode(chunk, book, Order{}); }

  template <int kRows>
  static void multiply(const Codes (&codes)[kRows], const X* x, Floats (&product)[kRows]) {
    Ints sum[kRows];
    unroll<4>([&](auto s) {
      const int16_t* const at = x + s * 2 * kLanes;
      const Pairs x_s = kRows > 1 ? load_pairs_once(at) : load_pairs(at);
      unroll<kRows>([&](auto w) {
        if constexpr (s == 0)
          sum[w] = dot(codes[w].v[s], x_s);
        else
          sum[w] = dot(sum[w], codes[w].v[s], x_s);
      });
    });
    unroll<kRows>([&](auto w) { product[w] = to_floats(sum[w]); });
  }

  bool arrange(const Segment& segment, int64_t stride, X* out, float* scale) const {
    const float* const x = segment.x;
    const int64_t chunks = segment.chunks;
    const uint32_t bits = largest_bits(x, chunks * kChunk);
    const uint32_t token_bits = segment.token_largest > bits ? segment.token_largest : bits;
    if (token_bits == 0) {
      *scale = 0.0f;
    } else if (bits < power_of_two_bits(-60) || bits > power_of_two_bits(60)) {
      return false;
    } else {
      if (!is_even<T>(kFewTokensRule, x, chunks * kChunk, segment.count, bits_float(token_bits))) return false;
      *scale = static_cast<float>(bits_float(bits) / (double{kLargestX} * per_one));
    }
    if (bits && limits_peak && !is_below_peak(x, chunks * kChunk, segment.count, bits_float(bits))) return false;
    const Floats inverse = splat(bits ? float{kLargestX} / bits_float(bits) : 0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      Ints rounded_x[kLaneWeights];
      for (int i = 0; i < kLaneWeights; ++i)
        rounded_x[i] = round_to_ints(mul(load(x + c * kChunk + i * kLanes), inverse));
      store_in_code_order(rounded_x, out + c * stride, Order{});
    }
    return true;
  }

  // The sums of the lanes' x of an arranged chunk. In HalfOrder, a lane has eight of the 32 values around it, which
  // meet the same offset.
  static Floats lane_sums(const X* chunk) {
    int16_t one[2 * kLanes];
    for (int16_t& o : one) o = 1;
    Ints sum = dot(load_pairs(one), load_pairs(chunk));
    for (int s = 1; s < 4; ++s) sum = dot(sum, load_pairs(one), load_pairs(chunk + s * 2 * kLanes));
    return to_floats(sum);
  }
  float one_of_code() const { return static_cast<float>(per_one); }
};

template <bool kHasOffsets, class T>
Outcome forward_int_as(const Pool& pool, const LinearProblem& p) {
  if (has_one_scale_per(32, p.w)) return forward_else_float<T, IntProducts<T, HalfOrder, kHasOffsets>>(pool, p);
  return forward_else_float<T, IntProducts<T, LaneOrder, kHasOffsets>>(pool, p);
}
template <bool kHasOffsets>
Outcome forward_int(const Pool& pool, const LinearProblem& p) {
  return p.dtype == DType::kBFloat16 ? forward_int_as<kHasOffsets, bfloat16>(pool, p)
                                     : forward_int_as<kHasOffsets, float16>(pool, p);
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
