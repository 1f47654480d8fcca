// many_tokens_int: dX of bfloat16 in integers. Tokens and groups of 64 columns that integers cannot serve fall back to
// float32, each by its own values alone, and get the bits of many_tokens_float.
//
// A task is that of dx-inl.h. A scale belongs to one row and a group of columns, so it cannot multiply a sum over rows,
// but it can multiply dy:
//
//   dx [token, column] = sum over rows (dy [token, row] · scale [row, group]) · code [row, column]
//
// dy is rounded once per slice, as x is in the forward (round_int-inl.h), with a step for each chain of 64 rows. For
// each group of columns, the integers are multiplied by scales of 15 bits and rounded again. Offsets multiply dy itself
// in float32, one product for a whole block.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dx-inl.h"
#include "cpp/cpu/many_tokens/dx_integers-inl.h"
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
#include "cpp/cpu/verdict/panel_columns-inl.h"
#include "cpp/format/dtypes.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

using IntColumns = verdict::PanelColumns<2 * kLongChain>;

// dx of the listed tokens [token, token + tokens) and columns [column, column + columns). `g` has the order of the
// list.
template <class T>
class DxIntTask : DxIntegersTask<WordF32, T> {
 public:
  using Base = DxIntegersTask<WordF32, T>;
  using Word = WordInt::Word;

  DxIntTask(const LinearDxProblem& p, const CenteredCodes<IntCodeTable>& codes, const TokenLists<T>& lists,
            const IntColumns& weights, const T* g, int64_t token, int64_t tokens, int64_t column, int64_t columns)
      : Base(p, g, 0, token, tokens, column, columns, weights.group_columns(), lists.places()),
        codes_(codes),
        lists_(lists),
        weights_(weights),
        values_(WordInt::values_of(codes.table.value)),
        dy_(reinterpret_cast<Word*>(this->broadcast_)),
        words_(reinterpret_cast<Word*>(this->lanes_)) {}

  void operator()() {
    this->run([this] { add_weight(); });
  }

 private:
  static constexpr int64_t kChainRows = IntColumns::kChainRows, kSliceChains = kDepth / kChainRows;
  static constexpr int64_t kSliceWords = kDepth / 2;
  static constexpr int64_t kScaledTokens = 48;  // so that they stay in the cache, and whole tiles of all sets

  void add_weight() {
    const LinearDxProblem& p = this->p_;
    const Cut slices = cut(p.w.n, 2 * this->shape_.piece_depth, kChainRows);
    const Pieces pieces{{0, p.w.n, this->column_, this->columns_}, slices.size, kIntColumns};
    const int64_t group = this->group_;
    float units[kTileLanes];
    for (float& unit : units) unit = 1.0f;
    ScaledPiece source;
    for (Piece piece = pieces.first(); piece.rows > 0; piece = pieces.after(piece)) {
      if (pieces.begins_strip(piece)) {
        source = ScaledPiece(p.w, pieces.strip(piece.row), this->scales_);
        round_slice(piece.row, piece.rows);
        this->add_offsets(source, piece, codes_.center);
      }
      if (weights_.in_float(piece.column / kIntColumns)) continue;
      decode(source, piece);
      WeightLinePrefetcher prefetcher = prefetch_piece(p.w, pieces.after(piece));
      for (int64_t c = 0; c < kIntColumns; c += group) round_scales(source, piece, piece.column + c, c / group);
      float* const sums = this->sums_ + (piece.column - this->column_) * this->tokens_;
      for (int64_t t = 0; t < this->tokens_; t += kScaledTokens) {
        const int64_t some = min(this->tokens_ - t, kScaledTokens);
        IntPanels in{scaled_dy_, units_, words_, units, static_cast<int>(piece.rows / kChainRows)};
        for (int64_t l = 0; l < kIntColumns; l += kTileLanes, in.lanes += kTileLanes * piece.rows / 2) {
          if (l % group == 0) scale_slice(piece, t, some, l / group);
          multiply_int<kLongChain>(in, some, kTileLanes, sums + l * this->tokens_ + t * kTileLanes,
                                   piece.row == 0 && p.lora.rank == 0, prefetcher);
        }
      }
    }
  }

  // Rounds rows [row, row + rows) of dy to 15 bits of a step for each chain.
  void round_slice(int64_t row, int64_t rows) {
    for (int64_t t = 0; t < this->tokens_; ++t) {
      const float* const steps = lists_.steps(this->place(t), this->p_.w.n / kChainRows) + row / kChainRows;
      const T* const dy = this->dy(t) + row;
      const int64_t ahead = this->dy(min(t + 3, this->tokens_ - 1)) - this->dy(t);
      for (int64_t r = 0; r < rows; r += 64 / sizeof(T)) __builtin_prefetch(dy + ahead + r);
      for (int64_t chain = 0; chain < rows / kChainRows; ++chain) {
        const float step = steps[chain];
        const F inverse = splat(step > 0.0f ? 1.0f / step : 0.0f);
        for (int64_t r = chain * kChainRows; r < (chain + 1) * kChainRows; r += 2 * kLanes)
          WordInt::store(dy_ + t * kSliceWords + r / 2, WordInt::round_row(dy + r, inverse));
        steps_[t * kSliceChains + chain] = step;
      }
    }
  }

  // Rounds the scales of the piece's rows in the group of columns that begins at `column` to 15 bits of their largest
  // in each chain.
  void round_scales(const ScaledPiece& source, const Piece& piece, int64_t column, int64_t group) {
    alignas(64) float scales[kDepth];
    for (int64_t r = 0; r < piece.rows; ++r) scales[r] = *source.scale_at(piece.row + r, column);
    for (int64_t chain = 0; chain < piece.rows / kChainRows; ++chain) {
      const float most = weights_.largest(piece.row / kChainRows + chain, column / weights_.group_columns());
      const F inverse = splat(most > 0.0f ? 32767.0f / most : 0.0f);
      for (int64_t r = chain * kChainRows; r < (chain + 1) * kChainRows; r += 2 * kLanes)
        WordInt::store(fractions_[group] + r / 2, WordInt::round_row(scales + r, inverse));
      largest_[group][chain] = static_cast<float>(most * (32768.0 / 32767.0) / codes_.table.per_one);
    }
  }

  // Multiplies the rounded slice of some tokens by the scales of a group.
  void scale_slice(const Piece& piece, int64_t token, int64_t tokens, int64_t group) {
    for (int64_t t = 0; t < tokens; ++t) {
      const Word* const dy = dy_ + (token + t) * kSliceWords;
      for (int64_t i = 0; i < piece.rows / 2; i += kLanes)
        WordInt::store(scaled_dy_ + t * kDepth + i,
                       WordInt::multiply_fractions(WordInt::load(dy + i), WordInt::load(fractions_[group] + i)));
      for (int64_t chain = 0; chain < piece.rows / kChainRows; ++chain)
        units_[t * kMostChains + chain] = steps_[(token + t) * kSliceChains + chain] * largest_[group][chain];
    }
  }

  void decode(const ScaledPiece& source, const Piece& piece) {
    Word* out = words_;
    for (int64_t row = piece.row; row < piece.row + piece.rows; row += 2, out += kTileLanes)
      WordInt::decode_lanes(values_, source.packed(row, piece.column), source.packed(row + 1, piece.column),
                            this->halves_, out, kTileLanes * piece.rows / 2);
  }

  const CenteredCodes<IntCodeTable>& codes_;
  const TokenLists<T>& lists_;
  const IntColumns& weights_;
  const WordInt::Values values_;
  Word *const dy_, *const words_;                        // dy_: the slice, [token][kSliceWords]
  alignas(64) float steps_[kMostTokens * kSliceChains];  // of the slice, by token and chain
  // Of the groups of a piece: the scales, and the largest of each chain.
  alignas(64) Word fractions_[kIntColumns / kLeastIntBlock][kSliceWords];
  float largest_[kIntColumns / kLeastIntBlock][kSliceChains];
  // Some tokens of the scaled slice.
  alignas(64) Word scaled_dy_[kScaledTokens * kDepth];
  alignas(64) float units_[kScaledTokens * kMostChains];
};

template <class T>
class IntDx {
 public:
  IntDx(const Pool& pool, const LinearDxProblem& p)
      : pool_(pool),
        p_(p),
        codes_(int_codes(p.w.code), p.w),
        rounding_(p.w.n, IntColumns::kChainRows, codes_.table, kLongChain),
        columns_(p.w) {}

  void operator()() {
    const auto carve = [&](void* base) {
      Carver memory(base);
      columns_.take(&memory);
      return memory.used();
    };
    carve(scratch(ScratchUse::kBefore, carve(nullptr)));
    if (4 * columns_.find(pool_) > columns_.units()) return dx<WordF32, T>(pool_, p_);
    run_lists(p_.m, p_.w.n, p_.lora.rank, p_.g, rounding_.pieces.count, &lists_,
              [&](int64_t first, int64_t tokens, int64_t copied, T* g) { multiply(first, tokens, copied, g); });
  }

 private:
  // Multiplies tokens [first, first + tokens), at most `copied` of them at once in float32. `g` is where theirs go.
  void multiply(int64_t first, int64_t tokens, int64_t copied, T* g) {
    const T* const dy = static_cast<const T*>(p_.dy);
    if (p_.lora.rank) {
      low_rank_of_call<WordF32, Factor::kFeatureByRank>(pool_, Matrix<T>{dy, p_.w.n}, p_.lora, first, tokens, p_.w.n,
                                                        g);
    }
    const int64_t served = lists_.find(pool_, rounding_, dy, first, tokens);
    if (served == 0) return dx_with_g<WordF32, T>(pool_, p_, g, first, tokens);
    const T* const of_served = lists_.copy_low(g, 0, served);
    run_dx_tasks(pool_, p_, kIntColumns, served, [&](int64_t token, int64_t of_task, int64_t column, int64_t columns) {
      DxIntTask<T>(p_, codes_, lists_, columns_, of_served, token, of_task, column, columns)();
    });
    for (int64_t i = served; i < tokens; i += copied) {
      const int64_t some = min(copied, tokens - i);
      LinearDxProblem part = p_;
      part.dy = lists_.copy_x(dy, i, some);
      dx_with_g<WordF32, T>(pool_, part, lists_.copy_low(g, i, some), 0, some, lists_.places() + i);
    }
    multiply_columns(first, tokens, g);
  }

  // Multiplies the columns that integers cannot serve.
  void multiply_columns(int64_t first, int64_t tokens, const T* g) const {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit)
        for (int64_t t = 0; t < tokens && columns_.in_float(unit); t += kMostTokens)
          DxTask<WordF32, T>(p_, g, first, first + t, min(kMostTokens, tokens - t), unit * kIntColumns, kIntColumns)();
    };
    pool_(columns_.units(), 1, body);
  }

  const Pool& pool_;
  const LinearDxProblem& p_;
  const CenteredCodes<IntCodeTable> codes_;
  const TokenRounding<T> rounding_;
  IntColumns columns_;
  TokenLists<T> lists_;
};

inline Outcome dx_int(const Pool& pool, const LinearDxProblem& p) {
  IntDx<bfloat16>(pool, p)();
  return Outcome::kDone;
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
