// many_tokens_int: the forward in integers. Tokens and weight rows that integers cannot serve fall back to float32,
// each by its own values alone, and get the bits of many_tokens_float.
//
// A task is that of forward-inl.h, with x and W in int16. The low-rank product and the bias stay in float32. Offsets
// multiply sums of the same rounded x.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/forward-inl.h"
#include "cpp/cpu/many_tokens/forward_float-inl.h"
#include "cpp/cpu/many_tokens/low_rank-inl.h"
#include "cpp/cpu/many_tokens/multiply_int-inl.h"
#include "cpp/cpu/many_tokens/round_int-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/verdict/rows-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

// Words of a chain, which lies in one block. Roundings of x are coarser in long chains, which bfloat16 permits.
template <class T>
int int_chain(const Weight& w) {
  return kMantissaBits<T> == 7 && w.scales.block_size >= 2 * kLongChain && !w.scales.offsets ? kLongChain : kShortChain;
}

// y of the listed tokens [token, token + tokens) and weight rows [row, row + rows). `h` has the order of the list.
template <class T>
class ForwardIntTask : ForwardTask<WordF32, T> {
 public:
  using Base = ForwardTask<WordF32, T>;
  using Word = WordInt::Word;

  ForwardIntTask(const LinearProblem& p, const TokenRounding<T>& rounding, const TokenLists<T>& lists, const T* h,
                 int64_t token, int64_t tokens, int64_t row, int64_t rows)
      : Base(p, h, 0, token, tokens, row, rows, lists.places()),
        rounding_(rounding),
        lists_(lists),
        codes_(int_codes(p.w.code)),
        chain_(int_chain<T>(p.w)),
        multiply_(p.w.scales.offsets     ? &multiply_int<kShortChain, true>
                  : chain_ == kLongChain ? &multiply_int<kLongChain>
                                         : &multiply_int<kShortChain>),
        values_(WordInt::values_of(codes_.value)),
        panel_(reinterpret_cast<Word*>(this->strip_)),
        words_(reinterpret_cast<Word*>(this->lanes_)) {}

  void operator()() {
    const int64_t most_columns = 2 * kMostLaneWords / round_up(this->tokens_, kLanes);
    const int64_t columns = max(most_columns / piece_columns_, 1) * piece_columns_;
    for (int64_t c = 0; c < this->p_.w.k; c += columns) add_columns(c, min(columns, this->p_.w.k - c));
    this->finish();
  }

 private:
  static constexpr int64_t kMostUnits = 2048, kMostLaneSums = 4 * kMostLaneWords / (2 * kShortChain);
  static constexpr int kWords = kIntColumns / 2;  // of a group

  // Multiplies columns [column, column + columns) of x with those of the weight.
  void add_columns(int64_t column, int64_t columns) {
    const Weight& w = this->p_.w;
    for (int64_t c = 0; c < columns; c += piece_columns_)
      round_piece(column + c, min(piece_columns_, columns - c), columns / 2, c / 2,
                  units_ + c / piece_columns_ * padded_tokens_, lane_sums_ + c / (2 * kShortChain) * padded_tokens_);
    const Pieces pieces{{this->row_, this->rows_, column, columns}, this->strips_.size, piece_columns_};
    RowPagePrefetcher pages(w, column, columns);
    pages.go_to(this->row_, this->row_ + this->rows_);
    ScaledPiece source;
    for (Piece piece = pieces.first(); piece.rows > 0; piece = pieces.after(piece)) {
      if (pieces.begins_strip(piece)) {
        pages.reach(piece.row + 3 * pieces.rows);
        source = ScaledPiece(w, pieces.strip(piece.row), this->scales_);
      }
      decode(source, piece);
      WeightLinePrefetcher prefetcher = prefetch_piece(w, pieces.after(piece));
      const int64_t first = piece.column - column;
      IntPanels in{panel_, chain_scales_, nullptr, nullptr, static_cast<int>(piece.columns / (2 * chain_))};
      in.offsets = chain_offsets_, in.sums_stride = padded_tokens_;
      for (int64_t l = 0; l < this->tokens_; l += kTileLanes) {
        const int64_t some = min(this->tokens_ - l, kTileLanes), width = tile_width(some);
        in.lanes = words_ + l * (columns / 2) + first / 2 * width;
        in.units = units_ + first / piece_columns_ * padded_tokens_ + l;
        in.lane_sums = lane_sums_ + first / (2 * kShortChain) * padded_tokens_ + l;
        multiply_(in, piece.rows, some, this->sums_ + l * this->rows_ + (piece.row - this->row_) * width,
                  piece.column == 0, prefetcher);
      }
    }
  }

  // Rounds a piece of x into a lanes panel of `depth` words, from word `at` on, and if W has offsets sums its chains.
  void round_piece(int64_t column, int64_t columns, int64_t depth, int64_t at, float* units, float* lane_sums) {
    const LinearProblem& p = this->p_;
    const int64_t piece = column / piece_columns_;
    for (int64_t first = 0; first < this->tokens_; first += kLanes) {
      const T* rows[kLanes];
      float inverse[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {  // lanes without a token hold zeros
        const bool is_token = first + i < this->tokens_;
        const int64_t token = this->places_[this->token_ + (is_token ? first + i : 0)];
        const float step = lists_.steps(token, rounding_.pieces.count)[piece];
        rows[i] = static_cast<const T*>(p.x) + token * p.w.k + column;
        inverse[i] = is_token && step > 0.0f ? 1.0f / step : 0.0f;
        units[first + i] = is_token ? static_cast<float>(step / codes_.per_one) : 0.0f;
      }
      const int64_t tile = first & -kTileLanes, width = tile_width(this->tokens_ - tile);
      Word* out = words_ + tile * depth + at * width + (first - tile);
      for (int64_t c = 0; c < columns; c += kIntColumns, out += kWords * width) {
        unroll<kWords / kLanes>([&](auto square) {
          F v[kLanes];
          unroll<kLanes>([&](auto i) {
            v[i.value] = WordInt::round_pairs(rows[i.value] + c + square.value * 2 * kLanes, splat(inverse[i.value]));
          });
          transpose(v);
          unroll<kLanes>([&](auto i) {
            constexpr int kStep = WordInt::step_of(square.value * kLanes + i.value);
            WordInt::store_bits(out + kStep * width, v[i.value]);
          });
        });
        if (!p.w.scales.offsets) continue;
        for (int64_t chain = 0; chain < kWords; chain += kShortChain) {
          auto sum = WordInt::no_sum();
          for (int64_t d = chain; d < chain + kShortChain; ++d)
            sum = WordInt::multiply_add(WordInt::broadcast(&kOnes), WordInt::load(out + d * width), sum);
          store(lane_sums + (c / 2 + chain) / kShortChain * padded_tokens_ + first, WordInt::to_floats(sum));
        }
      }
    }
  }

  void decode(const ScaledPiece& source, const Piece& piece) {
    Word* row_words = panel_;
    const float per_one = static_cast<float>(codes_.per_one);
    for (int64_t r = 0; r < piece.rows; ++r, row_words += kDepth) {
      const int64_t row = piece.row + r;
      for (int64_t c = 0; c < piece.columns; c += kIntColumns)
        WordInt::decode_row(values_, source.packed(row, piece.column + c), row_words + c / 2);
      for (int64_t c = 0; c < piece.columns; c += 2 * chain_) {
        const int64_t at = r * kMostChains + c / (2 * chain_);
        if (source.has_offsets()) {
          const ScaleAndOffset block = source.template block_of<true>(row, piece.column + c);
          chain_scales_[at] = block.scale, chain_offsets_[at] = block.offset * per_one;
        } else {
          chain_scales_[at] = source.template block_of<false>(row, piece.column + c);
        }
      }
    }
  }

  const TokenRounding<T>& rounding_;
  const TokenLists<T>& lists_;
  static constexpr Word kOnes = 0x00010001;
  const IntCodeTable& codes_;
  const int chain_;
  void (*const multiply_)(const IntPanels&, int64_t, int64_t, float*, bool, WeightLinePrefetcher&);
  const WordInt::Values values_;
  Word *const panel_, *const words_;
  const int64_t piece_columns_ = rounding_.pieces.size, padded_tokens_ = round_up(this->tokens_, kTileLanes);
  alignas(64) float units_[kMostUnits];         // [piece][lane]
  alignas(64) float lane_sums_[kMostLaneSums];  // [chain][lane]
  alignas(64) float chain_scales_[StripShape::kMostRows * kMostChains];
  alignas(64) float chain_offsets_[StripShape::kMostRows * kMostChains];
};

template <class T>
class IntForward {
 public:
  IntForward(const Pool& pool, const LinearProblem& p)
      : pool_(pool), p_(p), rounding_(p.w.k, 2 * kDepth, int_codes(p.w.code), int_chain<T>(p.w)), rank_(p.lora.rank) {}

  void operator()() {
    if (8 * find_rows() > p_.w.n) return forward<WordF32, T>(pool_, p_);
    run_lists(p_.m, p_.w.k, rank_, p_.h, rounding_.pieces.count, &lists_,
              [&](int64_t first, int64_t tokens, int64_t copied, T* h) { multiply(first, tokens, copied, h); });
  }

 private:
  static constexpr int64_t kGrain = 64;  // rows of a thread

  // Finds the rows that integers cannot serve, and returns their number.
  int64_t find_rows() {
    in_float_ = static_cast<uint8_t*>(scratch(ScratchUse::kBefore, p_.w.n));
    auto body = [&](int64_t begin, int64_t end) {
      const int64_t bytes = verdict::row_scales(p_.w) * static_cast<int64_t>(sizeof(float));
      float* const scales = static_cast<float*>(scratch(ScratchUse::kThread, bytes));
      for (int64_t row = begin; row < end; ++row) in_float_[row] = !verdict::serves_row(p_.w, row, scales);
    };
    pool_(p_.w.n, kGrain, body);
    int64_t count = 0;
    for (int64_t row = 0; row < p_.w.n; ++row) count += in_float_[row];
    return count;
  }

  // Multiplies tokens [first, first + tokens), at most `copied` of them at once in float32. `h` is where theirs go.
  void multiply(int64_t first, int64_t tokens, int64_t copied, T* h) {
    const T* const x = static_cast<const T*>(p_.x);
    if (rank_) {
      low_rank_of_call<WordF32, Factor::kRankByFeature>(pool_, Matrix<T>{x, p_.w.k}, p_.lora, first, tokens, p_.w.k, h);
    }
    const int64_t served = lists_.find(pool_, rounding_, x, first, tokens);
    if (served == 0) return forward_with_h<WordF32, T>(pool_, p_, h, first, tokens);
    const T* const of_served = lists_.copy_low(h, 0, served);
    run_forward_tasks(pool_, p_.w, served, [&](int64_t token, int64_t of_task, int64_t row, int64_t rows) {
      ForwardIntTask<T>(p_, rounding_, lists_, of_served, token, of_task, row, rows)();
    });
    for (int64_t i = served; i < tokens; i += copied) {
      const int64_t some = min(copied, tokens - i);
      LinearProblem part = p_;
      part.x = lists_.copy_x(x, i, some);
      forward_with_h<WordF32, T>(pool_, part, lists_.copy_low(h, i, some), 0, some, lists_.places() + i);
    }
    multiply_rows(first, tokens, h);
  }

  // Multiplies the rows that integers cannot serve.
  void multiply_rows(int64_t first, int64_t tokens, const T* h) const {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin, rows; row < end; row += max(rows, 1)) {
        for (rows = 0; row + rows < end && in_float_[row + rows];) ++rows;
        for (int64_t t = 0; t < tokens && rows; t += kMostTokens)
          forward_task<WordF32>(p_, h, first, first + t, min(kMostTokens, tokens - t), row, rows, nullptr);
      }
    };
    pool_(p_.w.n, kGrain, body);
  }

  const Pool& pool_;
  const LinearProblem& p_;
  const TokenRounding<T> rounding_;
  const int64_t rank_;
  uint8_t* in_float_ = nullptr;  // of each row: 1 if integers cannot serve it
  TokenLists<T> lists_;
};

inline Outcome forward_int(const Pool& pool, const LinearProblem& p) {
  if (p.dtype == DType::kBFloat16) {
    IntForward<bfloat16>(pool, p)();
  } else {
    IntForward<float16>(pool, p)();
  }
  return Outcome::kDone;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
