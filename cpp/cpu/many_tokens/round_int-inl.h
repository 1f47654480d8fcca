// What integer products can serve, and to which steps they round x.
//
// A token is cut into pieces of up to 2 * kDepth columns. Each piece is rounded to steps of its own, the smallest for
// which its values fit 15 bits and the int32 sum over every chain of products with the largest integer of the code is
// exact:
//
//   step = max(largest |x| / 32767,  largest sum of |x| over a chain / (2^31 / largest code))
//
// few_tokens_int rounds to `L / 32767` and asks for tokens that are even with respect to L (few_tokens/products-inl.h).
// Here L is 32767 times the largest step of the token, which is at least its largest value. Tokens may be less even,
// since rows must be less concentrated (kMinOfRow). README.md has what is promised.
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/code_tables.h"
#include "cpp/cpu/few_tokens/concentration-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/multiply_int-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
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

  // Tokens of `count` values, in pieces of at most `most`. They meet integers up to `largest`.
  TokenRounding(int64_t count, int64_t most, int largest, bool limits_peak)
      : pieces(cut(count, most, kIntColumns)),
        count_(count),
        limits_peak_(limits_peak),
        // Rounding may add a half to each value.
        largest_sum_(2147483647.0f / static_cast<float>(largest) * 0.9999f - static_cast<float>(kChainColumns) / 2) {}
  // The x of a forward.
  TokenRounding(const IntCodeTable& codes, int64_t k)
      : TokenRounding(k, 2 * kDepth, largest_of(codes), kMantissaBits<T> > 7 && codes.exact) {}

  const Cut pieces;

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
      serves = serves && is_even(at, columns, reference);
      if (limits_peak_)
        serves = serves && few_tokens::is_below_peak(at, columns, columns, 32767.0f * steps[piece], kMaxPeak);
    });
    return serves;
  }

 private:
  static constexpr float kSpread = kMantissaBits<T> == 7 ? 128.0f : 16.0f;
  static constexpr float kMaxPeak = 6.0f;  // as few_tokens_int

  template <class Body>
  void each_piece(const Body& body) const {
    for (int64_t piece = 0; piece < pieces.count; ++piece)
      body(piece, piece * pieces.size, min(pieces.size, count_ - piece * pieces.size));
  }
  // Whether enough of the values of x, none above `largest`, are large enough for its step: 3/4 are not zero, and of
  // these 3/8 are at least largest / kSpread, 5/8 at least half of that, and 7/8 at least a sixteenth of that.
  static bool is_even(const T* x, int64_t count, float largest) {
    const auto at_least = [&](float bound) {
      int64_t found = 0;
      for (int64_t c = 0; c < count; c += stream::kLanes)
        found += stream::count_at_least(stream::load(x + c, stream::kLanes), bound);
      return found;
    };
    const int64_t large = at_least(largest / kSpread);
    if (8 * large >= 7 * count) return true;  // of nearly every token
    const int64_t nonzero = at_least(bits_float(1));
    return 8 * large >= 3 * nonzero && 8 * at_least(largest / (2 * kSpread)) >= 5 * nonzero &&
           8 * at_least(largest / (16 * kSpread)) >= 7 * nonzero && 4 * nonzero >= 3 * count;
  }
  // 1 for the columns of a group that belong to a chain, and 0 for the others: the words of a group are not multiplied
  // in the order of memory.
  struct Chains {
    static constexpr int kCount = kIntColumns / kChainColumns;
    float member[kCount][kIntColumns] = {};

    constexpr Chains() {
      for (int c = 0; c < kIntColumns; ++c) member[panel::WordInt::step_of(c / 4 * 2 + c % 2) / kIntChain<T>][c] = 1.0f;
    }
  };
  static float largest_chain(const T* x, int64_t columns) {
    static constexpr Chains kChains;
    float largest = 0.0f;
    for (int64_t group = 0; group < columns; group += kIntColumns) {
      for (const auto& member : kChains.member) {
        stream::Floats sums = stream::zero();
        for (int64_t c = 0; c < kIntColumns; c += stream::kLanes) {
          const stream::Floats size = stream::absolute(stream::load(x + group + c, stream::kLanes));
          sums = Chains::kCount == 1 ? stream::add(sums, size) : stream::fma(size, stream::load(member + c), sums);
        }
        const float sum = stream::sum(sums);
        largest = sum > largest ? sum : largest;
      }
    }
    return largest;
  }

  static int largest_of(const IntCodeTable& codes) {
    int largest = 1;
    for (const int value : codes.value) largest = value > largest ? value : -value > largest ? -value : largest;
    return largest;
  }

  const int64_t count_;
  const bool limits_peak_;
  const float largest_sum_;
};

// The tokens of a call, those that integers can serve before the others, and copies of what belongs to some of them.
template <class T>
class TokenLists {
 public:
  // At most `tokens` tokens of `columns` values, `rank` low-rank values and `pieces` pieces, `copied` of them at once.
  void take(Carver* memory, int64_t tokens, int64_t columns, int64_t rank, int64_t pieces, int64_t copied) {
    columns_ = columns, rank_ = rank;
    x_copy_ = memory->take<T>(copied * columns);
    low_copy_ = memory->take<T>(tokens * rank);
    steps_ = memory->take<float>(tokens * pieces);
    places_ = memory->take<int64_t>(tokens);
    serves_ = memory->take<uint8_t>(tokens);
  }

  // Lists tokens [first, first + tokens) of x, and returns how many of them integers can serve.
  int64_t find(const Pool& pool, const TokenRounding<T>& rounding, const T* x, int64_t first, int64_t tokens) {
    first_ = first, tokens_ = tokens;
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        serves_[t] = rounding.find_steps(x + (first + t) * columns_, steps_ + t * rounding.pieces.count);
    };
    pool(tokens, 4, body);
    int64_t served = 0, last = tokens;
    for (int64_t t = 0; t < tokens; ++t) places_[serves_[t] ? served++ : --last] = first + t;
    return served;
  }

  const int64_t* places() const { return places_; }
  // The steps of a token's pieces.
  const float* steps(int64_t token, int64_t pieces) const { return steps_ + (token - first_) * pieces; }

  // The x of the listed tokens i .. i + count - 1, and their low-rank values, of which `low` holds those of all tokens.
  const T* copy_x(const T* x, int64_t i, int64_t count) const { return copy(x, columns_, 0, i, count, x_copy_); }
  const T* copy_low(const T* low, int64_t i, int64_t count) const {
    return count == tokens_ ? low : copy(low, rank_, first_, i, count, low_copy_);
  }

 private:
  const T* copy(const T* rows, int64_t columns, int64_t first, int64_t i, int64_t count, T* out) const {
    for (int64_t t = 0; t < count && columns; ++t)
      __builtin_memcpy(out + t * columns, rows + (places_[i + t] - first) * columns,
                       static_cast<size_t>(columns) * sizeof(T));
    return out;
  }

  int64_t columns_ = 0, rank_ = 0, first_ = 0, tokens_ = 0;
  T *x_copy_ = nullptr, *low_copy_ = nullptr;
  float* steps_ = nullptr;
  int64_t* places_ = nullptr;
  uint8_t* serves_ = nullptr;
};
inline constexpr int64_t kMostListed = 4096;     // tokens at once
inline constexpr int64_t kMostCopied = 1 << 19;  // values of x at once

// The least sum of all weights of a row or column that is not concentrated, in units of the largest weight: four times
// that of few_tokens_int.
inline constexpr float kMinOfRow = 4 * few_tokens::kMinOfAll;

// Whether integer products serve a row of W: its weights are finite, and it is not concentrated
// (few_tokens/concentration-inl.h). `scales` has room for row_scales(w).
inline bool serves_row(const Weight& w, int64_t row, float* scales) {
  const few_tokens::ScaleReader reader(w.scales);
  const int64_t first = row * w.k / reader.granule(), count = ceil_div((row + 1) * w.k, reader.granule()) - first;
  reader.read(first, count, scales);
  const uint32_t largest = few_tokens::largest_bits_within(scales, count);
  if (bits_float(largest) > few_tokens::kHugeScale || largest >= kInfinityBits) return false;
  const few_tokens::GranuleScales of_row{scales, nullptr, first, count, 0.0f};
  return !few_tokens::RowConcentration(w, reader, of_row, kMinOfRow).is_concentrated(row);
}
inline int64_t row_scales(const Weight& w) {
  return ceil_div(w.k, few_tokens::ScaleReader(w.scales).granule()) + 2 + stream::kLanes;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
