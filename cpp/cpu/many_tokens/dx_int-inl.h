// many_tokens_int: dX of bfloat16 in integers. Tokens and groups of 64 columns that integers cannot serve fall back to
// float32, each by its own values alone, and get the bits of many_tokens_float.
//
// A task is that of dx-inl.h. A slice of dy is rounded as a piece of x is (round_int-inl.h). Its weights are rounded to
// 14 bits of the largest possible weight of the slice and a group of columns, so that a unit multiplies the sums of a
// slice and not every weight row.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/few_tokens/concentration-inl.h"
#include "cpp/cpu/few_tokens/products-inl.h"
#include "cpp/cpu/few_tokens/weight-inl.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dx-inl.h"
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
#include "cpp/format/dtypes.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

inline constexpr int kLargestWeight = 8191;

// The groups of kIntColumns columns of a weight: the largest scale of each in each slice of rows, and whether integers
// can serve it.
class IntColumns {
 public:
  IntColumns(const Weight& w, const Cut& slices)
      : w_(w), slices_(slices), groups_(w.k / kIntColumns), reader_(w.scales, kIntColumns) {}

  void take(Carver* memory) {
    largest_ = memory->take<float>(slices_.count * groups_);
    in_float_ = memory->take<uint8_t>(slices_.count * groups_);
  }
  // Returns the number of groups that integers cannot serve.
  int64_t find(const Pool& pool) {
    auto scan_slices = [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end; ++slice) scan_slice(slice);
    };
    pool(slices_.count, 1, scan_slices);
    auto scan_groups = [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) in_float_[group] = !serves_group(group);
    };
    pool(groups_, 4, scan_groups);
    int64_t count = 0;
    for (int64_t group = 0; group < groups_; ++group) count += in_float_[group];
    return count;
  }
  bool in_float(int64_t group) const { return in_float_[group]; }
  float largest(int64_t slice, int64_t group) const { return largest_[slice * groups_ + group]; }
  int64_t groups() const { return groups_; }

 private:
  // Most rows of a slice must have similar scales, and all of them finite ones, or their weights are rounded too
  // coarsely.
  void scan_slice(int64_t slice) {
    const int64_t first = slice * slices_.size, rows = min(slices_.size, w_.n - first),
                  stride = groups_ + stream::kLanes + 2;
    float* const scales =
        static_cast<float*>(scratch(ScratchUse::kThread, rows * stride * static_cast<int64_t>(sizeof(float))));
    float* const largest = largest_ + slice * groups_;
    for (int64_t r = 0; r < rows; ++r) reader_.read((first + r) * groups_, groups_, scales + r * stride);
    for (int64_t g = 0; g < groups_; ++g) {
      uint32_t bits = 0;  // as an integer, a NaN is above all numbers
      for (int64_t r = 0; r < rows; ++r) {
        const uint32_t of_row = float_bits(__builtin_fabsf(scales[r * stride + g]));
        bits = of_row > bits ? of_row : bits;
      }
      largest[g] = bits_float(bits);
      int64_t similar = 0;
      for (int64_t r = 0; r < rows; ++r) similar += __builtin_fabsf(scales[r * stride + g]) * 4.0f >= largest[g];
      in_float_[slice * groups_ + g] = !(largest[g] <= few_tokens::kHugeScale) || 8 * similar < 5 * rows;
    }
  }

  // No column of the group may be concentrated (few_tokens/concentration-inl.h), as far as the largest possible weight
  // of the group proves it.
  bool serves_group(int64_t group) const {
    float bound = 0.0f;
    for (int64_t slice = 0; slice < slices_.count; ++slice) {
      if (in_float_[slice * groups_ + group]) return false;
      bound = largest(slice, group) > bound ? largest(slice, group) : bound;
    }
    bound *= w_.table().largest;
    if (bound == 0.0f) return true;
    const stream::Floats most = stream::splat(bound * few_tokens::kMaxOfOne);
    stream::Floats sums[kIntColumns / stream::kLanes];
    for (stream::Floats& sum : sums) sum = stream::zero();
    for (int64_t row = 0; row < w_.n; ++row) {
      float scale[1 + stream::kLanes];
      const int64_t granule = row * groups_ + group;
      reader_.read(granule, 1, scale);
      few_tokens::WeightPieces pieces(w_, reader_, {scale, nullptr, granule, 1, 0.0f});
      const int64_t first = row * w_.k + group * kIntColumns;
      const float* const weights = pieces.decode(first, first + kIntColumns);
      for (int64_t i = 0; i < kIntColumns / stream::kLanes; ++i) {
        const stream::Floats size = stream::absolute(stream::load(weights + i * stream::kLanes));
        sums[i] = stream::add(sums[i], stream::min(size, most));
      }
      if (row % 16 == 15 && suffice(sums, bound)) return true;
    }
    return suffice(sums, bound);
  }
  static bool suffice(const stream::Floats (&sums)[kIntColumns / stream::kLanes], float bound) {
    for (const stream::Floats sum : sums)
      if (stream::count_at_least(sum, kMinOfRow * bound) < stream::kLanes) return false;
    return true;
  }

  const Weight& w_;
  const Cut slices_;
  const int64_t groups_;
  const few_tokens::ScaleReader reader_;
  float* largest_ = nullptr;
  uint8_t* in_float_ = nullptr;  // first of every slice, then of the whole column
};

// dx of the listed tokens [token, token + tokens) and columns [column, column + columns). `g` has the order of the
// list.
template <class T>
class DxIntTask : DxTask<WordF32, T> {
 public:
  using Base = DxTask<WordF32, T>;
  using Word = WordInt::Word;

  DxIntTask(const LinearDxProblem& p, const TokenRounding<T>& rounding, const TokenLists<T>& lists,
            const IntColumns& weights, const T* g, int64_t token, int64_t tokens, int64_t column, int64_t columns)
      : Base(p, g, 0, token, tokens, column, columns, lists.places()),
        rounding_(rounding),
        lists_(lists),
        weights_(weights),
        values_(panel::values_of(p.w.table())),
        dy_(reinterpret_cast<Word*>(this->broadcast_)),
        words_(reinterpret_cast<Word*>(this->lanes_)) {}

  void operator()() {
    this->begin();
    add_weight();
    this->finish();
  }

 private:
  void add_weight() {
    const LinearDxProblem& p = this->p_;
    const Pieces pieces{{0, p.w.n, this->column_, this->columns_}, rounding_.pieces.size, kIntColumns};
    ScaledPiece source;
    for (Piece piece = pieces.first(); piece.rows > 0; piece = pieces.after(piece)) {
      if (pieces.begins_strip(piece)) {
        source = ScaledPiece(p.w, pieces.strip(piece.row), this->scales_);
        round_slice(piece.row, piece.rows);
      }
      const float largest = weights_.largest(piece.row / rounding_.pieces.size, piece.column / kIntColumns);
      const float unit = largest * p.w.table().largest / kLargestWeight;
      decode(source, piece, unit > 0.0f ? 1.0f / unit : 0.0f);
      float units[kTileLanes];
      for (float& u : units) u = unit;
      WeightLinePrefetcher prefetcher = prefetch_piece(p.w, pieces.after(piece));
      IntPanels in{dy_, units_, words_, units, static_cast<int>(piece.rows / TokenRounding<T>::kChainColumns)};
      float* const sums = this->sums_ + (piece.column - this->column_) * this->tokens_;
      for (int64_t l = 0; l < kIntColumns; l += kTileLanes, in.lanes += kTileLanes * piece.rows / 2)
        multiply_int<kIntChain<T>>(in, this->tokens_, kTileLanes, sums + l * this->tokens_,
                                   piece.row == 0 && p.lora.rank == 0, prefetcher);
    }
  }

  // Rounds rows [row, row + rows) of dy into the broadcast panel.
  void round_slice(int64_t row, int64_t rows) {
    for (int64_t t = 0; t < this->tokens_; ++t) {
      const int64_t token = this->place(t);
      const float step = lists_.steps(token, rounding_.pieces.count)[row / rounding_.pieces.size];
      const F inverse = splat(step > 0.0f ? 1.0f / step : 0.0f);
      const T* const dy = static_cast<const T*>(this->p_.dy) + token * this->p_.w.n + row;
      for (int64_t r = 0; r < rows; r += 2 * kLanes)
        WordInt::store(dy_ + t * kDepth + r / 2, WordInt::round_row(dy + r, inverse));
      for (int64_t chain = 0; chain < kMostChains; ++chain) units_[t * kMostChains + chain] = step;
    }
  }

  void decode(const ScaledPiece& source, const Piece& piece, float inverse) {
    Word* out = words_;
    for (int64_t row = piece.row; row < piece.row + piece.rows; row += 2, out += kTileLanes)
      WordInt::decode_lanes(values_, source.packed(row, piece.column), source.packed(row + 1, piece.column),
                            source.template block_of<false>(row, piece.column) * inverse,
                            source.template block_of<false>(row + 1, piece.column) * inverse, out,
                            kTileLanes * piece.rows / 2);
  }

  const TokenRounding<T>& rounding_;
  const TokenLists<T>& lists_;
  const IntColumns& weights_;
  const Table values_;
  Word *const dy_, *const words_;
  alignas(64) float units_[kMostTokens * kMostChains];  // [token][chain]
};

template <class T>
class IntDx {
 public:
  IntDx(const Pool& pool, const LinearDxProblem& p)
      : pool_(pool),
        p_(p),
        rounding_(p.w.n, 2 * DxShape(p).piece_depth, kLargestWeight, false),
        rank_(p.lora.rank),
        columns_(p.w, rounding_.pieces) {}

  void operator()() {
    const auto carve = [&](void* base) {
      Carver memory(base);
      columns_.take(&memory);
      return memory.used();
    };
    carve(scratch(ScratchUse::kBefore, carve(nullptr)));
    if (4 * columns_.find(pool_) > columns_.groups()) return dx<WordF32, T>(pool_, p_);
    const int64_t some = min(rank_ && !p_.g ? shared_tokens<T>(p_.m, rank_) : p_.m, kMostListed);
    const int64_t copied = min(some, max(kMostCopied / p_.w.n, kTileLanes));
    T* g = nullptr;
    const auto lay_out = [&](void* base) {
      Carver memory(base);
      g = memory.take<T>(p_.g ? 0 : some * rank_);
      lists_.take(&memory, some, p_.w.n, rank_, rounding_.pieces.count, copied);
      return memory.used();
    };
    lay_out(scratch(ScratchUse::kCall, lay_out(nullptr)));
    for (int64_t first = 0; first < p_.m; first += some)
      multiply(first, min(some, p_.m - first), copied, p_.g ? static_cast<T*>(p_.g) + first * rank_ : g);
  }

 private:
  // Multiplies tokens [first, first + tokens), at most `copied` of them at once in float32. `g` is where theirs go.
  void multiply(int64_t first, int64_t tokens, int64_t copied, T* g) {
    const T* const dy = static_cast<const T*>(p_.dy);
    if (rank_) {
      low_rank_of_call<WordF32, Factor::kFeatureByRank>(pool_, Matrix<T>{dy, p_.w.n}, p_.lora, first, tokens, p_.w.n,
                                                        g);
    }
    const int64_t served = lists_.find(pool_, rounding_, dy, first, tokens);
    if (served == 0) return dx_with_g<WordF32, T>(pool_, p_, g, first, tokens);
    const T* const of_served = lists_.copy_low(g, 0, served);
    run_dx_tasks(pool_, p_, kIntColumns, served, [&](int64_t token, int64_t of_task, int64_t column, int64_t columns) {
      DxIntTask<T>(p_, rounding_, lists_, columns_, of_served, token, of_task, column, columns)();
    });
    for (int64_t i = served; i < tokens; i += copied) {
      const int64_t some = min(copied, tokens - i);
      LinearDxProblem part = p_;
      part.dy = lists_.copy_x(dy, i, some);
      dx_with_g<WordF32, T>(pool_, part, lists_.copy_low(g, i, some), 0, some, lists_.places() + i);
    }
    multiply_columns(first, tokens, g);
  }

  // Multiplies the groups of columns that integers cannot serve.
  void multiply_columns(int64_t first, int64_t tokens, const T* g) const {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group)
        for (int64_t t = 0; t < tokens && columns_.in_float(group); t += kMostTokens)
          DxTask<WordF32, T>(p_, g, first, first + t, min(kMostTokens, tokens - t), group * kIntColumns, kIntColumns)();
    };
    pool_(columns_.groups(), 1, body);
  }

  const Pool& pool_;
  const LinearDxProblem& p_;
  const TokenRounding<T> rounding_;
  const int64_t rank_;
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
