// What integer products can serve, and to which steps they round x.
//
// A token is cut into pieces of up to 2 * kDepth columns. Each piece is rounded to steps of its own, the smallest for
// which its values fit 15 bits and the int32 sum over every chain of products with the largest integer of the code is
// exact:
//
//   step = max(largest |x| / 32767,  largest sum of |x| over a chain / (2^31 / largest code))
//
// few_tokens_int rounds to `L / 32767` and asks for tokens that are even with respect to L (few_tokens/products-inl.h).
// Here L is 32767 times the largest step of the token, which is at least its largest value. It is 8 times the mean of a
// chain if that is larger: no loss for numbers from N(0, 1), and none for tokens with larger values. README.md has what
// is promised.
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/code_tables.h"
#include "cpp/cpu/few_tokens/concentration-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/many_tokens/multiply_int-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

// How the tokens of a problem are rounded.
template <class T>
class TokenRounding {
 public:
  static constexpr int64_t kChainColumns = 2 * kIntChain<T>;

  TokenRounding(Code code, int64_t k)
      : codes_(int_codes(code)),
        k_(k),
        limits_peak_(kMantissaBits<T> > 7 && codes_.exact),
        pieces(cut(k, 2 * kDepth, kIntColumns)) {
    int largest = 1;
    for (const int value : codes_.value) largest = value > largest ? value : -value > largest ? -value : largest;
    // Rounding may add a half to each value.
    largest_sum_ = 2147483647.0f / static_cast<float>(largest) * 0.9999f - static_cast<float>(kChainColumns) / 2;
  }

  // Sets the steps of token x, one for each piece. Returns false if integers cannot serve the token.
  bool find_steps(const T* x, float* steps) const {
    float reference = 0.0f;
    each_piece([&](int64_t piece, int64_t column, int64_t columns) {
      const float largest = bits_float(few_tokens::largest_bits_within(x + column, columns));
      const float step = largest / 32767.0f, step_of_sums = largest_chain(x + column, columns) / largest_sum_;
      steps[piece] = step > step_of_sums ? step : step_of_sums;
      const bool is_in_range = largest >= 0x1p-60f && largest <= 0x1p60f;
      if (!is_in_range && largest != 0.0f) reference = bits_float(kInfinityBits);
      if (32767.0f * steps[piece] > reference) reference = 32767.0f * steps[piece];
    });
    if (reference == 0.0f) return true;
    bool serves = reference < bits_float(kInfinityBits);
    each_piece([&](int64_t piece, int64_t column, int64_t columns) {
      const T* const at = x + column;
      serves = serves && few_tokens::is_even(at, columns, columns, reference, kSpread);
      if (limits_peak_)
        serves = serves && few_tokens::is_below_peak(at, columns, columns, 32767.0f * steps[piece], kMaxPeak);
    });
    return serves;
  }

  // The value of 1 in the integer sums over a piece with this step.
  float unit(float step) const { return static_cast<float>(step / codes_.per_one); }
  const IntCodeTable& codes() const { return codes_; }

 private:
  static constexpr float kSpread = kMantissaBits<T> == 7 ? 128.0f : 16.0f, kMaxPeak = 6.0f;  // as few_tokens_int

  template <class Body>
  void each_piece(const Body& body) const {
    for (int64_t piece = 0; piece < pieces.count; ++piece)
      body(piece, piece * pieces.size, min(pieces.size, k_ - piece * pieces.size));
  }
  static float largest_chain(const T* x, int64_t columns) {
    float largest = 0.0f;
    for (int64_t chain = 0; chain < columns; chain += kChainColumns) {
      stream::Floats sums = stream::zero();
      for (int64_t c = chain; c < chain + kChainColumns; c += stream::kLanes)
        sums = stream::add(sums, stream::absolute(stream::load(x + c, stream::kLanes)));
      const float sum = stream::sum(sums);
      largest = sum > largest ? sum : largest;
    }
    return largest;
  }

  const IntCodeTable& codes_;
  const int64_t k_;
  const bool limits_peak_;
  float largest_sum_;

 public:
  const Cut pieces;
};

// Whether integer products serve a row of W: its weights are finite, and it is not concentrated
// (few_tokens/concentration-inl.h). `scales` has room for row_scales(w).
inline bool serves_row(const Weight& w, int64_t row, float* scales) {
  const few_tokens::ScaleReader reader(w.scales);
  const int64_t first = row * w.k / reader.granule(), count = ceil_div((row + 1) * w.k, reader.granule()) - first;
  reader.read(first, count, scales);
  const uint32_t largest = few_tokens::largest_bits_within(scales, count);
  if (bits_float(largest) > few_tokens::kHugeScale || largest >= kInfinityBits) return false;
  const few_tokens::GranuleScales of_row{scales, nullptr, first, count, 0.0f};
  return !few_tokens::RowConcentration(w, reader, of_row).is_concentrated(row);
}
inline int64_t row_scales(const Weight& w) {
  return ceil_div(w.k, few_tokens::ScaleReader(w.scales).granule()) + 2 + stream::kLanes;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
