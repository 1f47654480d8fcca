// What integer products can serve, and to which steps they round x.
//
// A token is cut into pieces, of up to 2 * kDepth columns (dX: one chain each). Each piece is rounded to steps of its
// own, the smallest for which its values fit 15 bits and the int32 sum over every chain of products with the largest
// integer of the code is exact:
//
//   step = max(largest |x| / 32767,  largest sum of |x| over a chain / (2^31 / largest code))
//
// few_tokens_int rounds to `L / 32767` and asks for tokens that are even with respect to L (verdict/tokens-inl.h).
// Here a token is served if each of its pieces is even with respect to 32767 times its own step. Otherwise parts of up
// to 2 * kDepth columns must be even with respect to 32767 times a step that is at least the root mean square of all,
// and at least a quarter of the largest. Tokens may be less even, since rows must be less concentrated
// (kManyTokensRule). README.md has what is promised.
#pragma once

#include <cstdint>

#include "cpp/cpu/codec/largest-inl.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/multiply_int-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/verdict/tokens-inl.h"
#include "cpp/format/code_tables.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

// How the tokens of a problem are rounded.
template <class T>
class TokenRounding {
 public:
  // Tokens of `count` values, in pieces of at most `most`, which meet `codes` in chains of `chain` words.
  TokenRounding(int64_t count, int64_t most, const IntCodeTable& codes, int chain)
      : pieces(cut(count, most, kIntColumns)),
        count_(count),
        chain_columns_(2 * chain),
        limits_peak_(kMantissaBits<T> > 7 && codes.exact),
        // Rounding may add a half to each value.
        largest_sum_(2147483647.0f / static_cast<float>(largest_of(codes)) * 0.9999f - static_cast<float>(chain)) {}

  const Cut pieces;

  // Sets the steps of token x, one for each piece. Returns false if integers cannot serve the token.
  bool find_steps(const T* x, float* steps) const {
    float largest_value = 0.0f, largest_step = 0.0f;
    double squares = 0.0;
    const auto set_step = [&](int64_t piece, int64_t column, int64_t columns) {
      const float largest = bits_float(largest_bits_within(x + column, columns));
      if (!(largest <= 0x1p60f)) return false;
      const float step = largest / 32767.0f, step_of_sums = largest_chain(x + column, columns) / largest_sum_;
      steps[piece] = step > step_of_sums ? step : step_of_sums;
      largest_value = largest > largest_value ? largest : largest_value;
      largest_step = steps[piece] > largest_step ? steps[piece] : largest_step;
      squares += static_cast<double>(columns) * steps[piece] * steps[piece];
      return true;
    };
    if (!each_piece(pieces, set_step)) return false;
    if (largest_step == 0.0f) return true;
    if (largest_value < 0x1p-60f) return false;
    for (int64_t piece = 0; piece < pieces.count; ++piece)
      if (steps[piece] < largest_step * 0x1p-40f) steps[piece] = largest_step * 0x1p-40f;
    float typical = largest_step;  // at least the root mean square
    for (int i = 0; i < 2 && 0.25 * typical * typical * static_cast<double>(count_) >= squares; ++i) typical *= 0.5f;
    const auto is_even_part = [&](int64_t, int64_t column, int64_t columns) {
      return verdict::is_even<T>(verdict::kManyTokensRule, x + column, columns, columns, 32767.0f * typical);
    };
    const auto is_even_piece = [&](int64_t piece, int64_t column, int64_t columns) {
      return verdict::is_even<T>(verdict::kManyTokensRule, x + column, columns, columns, 32767.0f * steps[piece]);
    };
    const auto is_below_peak = [&](int64_t piece, int64_t column, int64_t columns) {
      return verdict::is_below_peak(x + column, columns, columns, 32767.0f * steps[piece]);
    };
    return (each_piece(cut(count_, 2 * kDepth, kIntColumns), is_even_part) || each_piece(pieces, is_even_piece)) &&
           (!limits_peak_ || each_piece(pieces, is_below_peak));
  }

 private:
  // Whether `holds` of all pieces.
  template <class Holds>
  bool each_piece(const Cut& pieces, const Holds& holds) const {
    for (int64_t piece = 0; piece < pieces.count; ++piece)
      if (!holds(piece, piece * pieces.size, min(pieces.size, count_ - piece * pieces.size))) return false;
    return true;
  }
  float largest_chain(const T* x, int64_t columns) const {
    float largest = 0.0f;
    for (int64_t chain = 0; chain < columns; chain += chain_columns_) {
      stream::Floats sums = stream::zero();
      for (int64_t c = chain; c < chain + chain_columns_; c += stream::kLanes)
        sums = stream::add(sums, stream::absolute(stream::load(x + c, stream::kLanes)));
      const float sum = stream::sum(sums);
      largest = sum > largest ? sum : largest;
    }
    return largest;
  }

  static int largest_of(const IntCodeTable& codes) {
    int largest = 1;
    for (const int value : codes.value) largest = value > largest ? value : -value > largest ? -value : largest;
    return largest;
  }

  const int64_t count_, chain_columns_;
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

// Calls multiply(first, tokens, copied, low) for tokens first .. first + tokens - 1 of m, until all are done: `lists`
// has room for them, and for copies of `copied`. `low`, where their low-rank values go, is part of all_low if the
// caller keeps those.
template <class T, class Multiply>
void run_lists(int64_t m, int64_t columns, int64_t rank, void* all_low, int64_t pieces, TokenLists<T>* lists,
               const Multiply& multiply) {
  constexpr int64_t kMostListed = 4096;     // tokens at once
  constexpr int64_t kMostCopied = 1 << 19;  // values of x at once
  const int64_t some = min(rank && !all_low ? shared_tokens<T>(m, rank) : m, kMostListed);
  const int64_t copied = min(some, max(kMostCopied / columns, kTileLanes));
  T* shared = nullptr;
  const auto lay_out = [&](void* base) {
    Carver memory(base);
    shared = memory.take<T>(all_low ? 0 : some * rank);
    lists->take(&memory, some, columns, rank, pieces, copied);
    return memory.used();
  };
  lay_out(scratch(ScratchUse::kCall, lay_out(nullptr)));
  for (int64_t first = 0; first < m; first += some)
    multiply(first, min(some, m - first), copied, all_low ? static_cast<T*>(all_low) + first * rank : shared);
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
