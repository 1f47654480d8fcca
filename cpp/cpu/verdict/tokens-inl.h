// Whether integer products can serve a token: they round x to a fixed step of its largest value, so most of its values
// must not be far smaller. README.md derives the rules.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace verdict {

using namespace stream;

// At least eighths / 8 of a token's nonzero values must be largest / (kSpread<T> · divisor) or more.
struct Share {
  int eighths;
  float divisor;
};
// What a kernel requires before it multiplies in integers.
struct Rule {
  Share shares[3];
  float least_sum;  // of the weights of a row or column, in units of its largest (rows-inl.h)
};
inline constexpr Rule kFewTokensRule = {{{5, 1.0f}, {7, 8.0f}}, 2.0f};
// Panels ask more of rows and less of tokens, because most activations have channels that are far larger than others.
inline constexpr Rule kManyTokensRule = {{{3, 1.0f}, {5, 2.0f}, {7, 16.0f}}, 8.0f};

template <class T>
inline constexpr float kSpread = kMantissaBits<T> == 7 ? 128.0f : 16.0f;

// The most that largest / root mean square of x may be where the integers are the values of the codes exactly and T is
// float16: the error then is 1.04 times that of rounding y.
inline constexpr float kMaxPeak = 6.0f;

// Whether the `count` values of x, none above `largest`, are similar enough in size for one step: 3/4 are not zero, and
// these have the shares of the rule. Zeros alone are even. From `count` to padded_count, x is zero. A NaN counts as
// zero. T is the dtype of the problem.
template <class T, class X>
bool is_even(const Rule& rule, const X* x, int64_t padded_count, int64_t count, float largest) {
  const auto at_least = [&](float bound) {
    int64_t found = 0;
    for (int64_t c = 0; c < padded_count; c += kLanes) found += count_at_least(load(x + c, padded_count - c), bound);
    return found;
  };
  const int64_t large = at_least(largest / kSpread<T>);
  if (8 * large >= 7 * count) return true;  // of most tokens
  const int64_t nonzero = at_least(bits_float(1));
  if (nonzero == 0) return true;
  if (4 * nonzero < 3 * count || 8 * large < rule.shares[0].eighths * nonzero) return false;
  for (int i = 1; i < 3; ++i) {
    const Share& share = rule.shares[i];
    if (share.eighths && 8 * at_least(largest / (kSpread<T> * share.divisor)) < share.eighths * nonzero) return false;
  }
  return true;
}

// Whether the root mean square of the `count` values of x is at least largest / kMaxPeak. From `count` to padded_count,
// x is zero.
template <class T>
bool is_below_peak(const T* x, int64_t padded_count, int64_t count, float largest) {
  const Floats inverse = splat(1.0f / largest);
  Floats squares = zero();
  for (int64_t c = 0; c < padded_count; c += kLanes) {
    const Floats relative = mul(load(x + c, padded_count - c), inverse);
    squares = fma(relative, relative, squares);
  }
  return sum(squares) * (kMaxPeak * kMaxPeak) >= static_cast<float>(count);
}

}  // namespace verdict
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
