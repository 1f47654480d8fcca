// The input gradient of the fused linear layer for many tokens, dx = dy · w + mask ∘ (g · a) · keep_scale.
//
// Each task owns a rectangle of the output and sums it in float32 scratch. It decodes a piece of the packed weight into
// a panel that stays in the second-level cache, multiplies the panel with all its tokens, and goes on to the next piece
// along the summed dimension. The low-rank product is one more such step. The order of an element's sum does not depend
// on the tasks, so the result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpp/cpu/dispatch.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/adapters-inl.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/dropout_mask-inl.h"
#include "cpp/cpu/many_tokens/low_rank-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

// Applies dropout in place to dx's low-rank part: sums whose lanes are columns in decoded order. Row t of the sums is
// token place(t).
template <class Place>
void drop_sums(const Dropout& d, float* sums, const Place& place, int64_t tokens, int64_t k, int64_t column,
               int64_t columns) {
  const Scale keep_scale(d.keep_scale);
  const F all = splat(1.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t first = 0; first < columns; first += Mask::kMax) {
      const Mask mask(d, place(t) * k + column + first, min(columns - first, Mask::kMax));
      for (int64_t c = first; c < columns && c < first + Mask::kMax; c += kGroup) {
        F kept[4];
        unroll<4>([&](auto q) { kept[q.value] = mask(all, c - first + q.value * kLanes); });
        memory_to_decoded_order(kept);
        unroll<4>([&](auto q) {
          float* s = sums + (c + q.value / 2 * kTileLanes) * tokens + t * kTileLanes + q.value % 2 * kLanes;
          store(s, keep_scale(mul(load(s), kept[q.value])));
        });
      }
    }
  }
}

// How many columns a task takes, and the pieces it decodes. With few tokens, a piece fills the first-level cache. With
// many, decoding costs little, and deeper pieces add to the sums less often. A piece that is decoded during the
// multiplication of the previous one has its own panel.
struct DxShape {
  bool interleaved;
  int64_t most_columns, piece_columns, piece_depth;

  // Depends on the whole problem, not on the task, because the order of the sums depends on it.
  explicit DxShape(const LinearDxProblem& p) : DxShape(p.m, ScaledPiece::interleaves(p.w)) {}
  constexpr DxShape(int64_t m, bool interleaved_)
      : interleaved(interleaved_),
        most_columns(most_dx_columns(m)),
        piece_columns(m <= kFewTokens && interleaved ? kGroup : 2 * kGroup),
        piece_depth(m <= kFewTokens ? 64 : kDepth / 2) {}

  constexpr int64_t piece_words() const { return piece_columns * piece_depth; }
  constexpr int64_t scale_floats() const { return ScaledPiece::scale_floats(2 * piece_depth, most_columns); }
  constexpr int64_t bytes(int64_t tokens) const {
    return 4 * (tokens * kDepth + 2 * piece_words() + tokens * most_columns + 2 * scale_floats());
  }
  static constexpr int64_t kFewTokens = kFewDxTokens;
};
static_assert(DxShape(DxShape::kFewTokens, true).bytes(DxShape::kFewTokens) <= kTaskBytes);
static_assert(DxShape(kMostTokens, true).bytes(kMostTokens) <= kTaskBytes);

// dx of tokens [token, token + tokens) and columns [column, column + columns). Tokens are broadcast, columns are the
// lanes. `g` begins at token `first_token`. The low-rank product comes first, since dropout acts on it alone. If there
// are `places`, token t of dx is row places[t], also for dropout.
template <class W, class T>
class DxTask {
 public:
  using Word = typename W::Word;

  DxTask(const LinearDxProblem& p, const T* g, int64_t first_token, int64_t token, int64_t tokens, int64_t column,
         int64_t columns, const int64_t* places = nullptr)
      : p_(p),
        g_(g),
        places_(places),
        first_token_(first_token),
        token_(token),
        tokens_(tokens),
        column_(column),
        columns_(columns),
        width_(round_up(columns, kGroup)) {
    const int64_t offset_floats = p.w.scales.offsets ? 2 * shape_.scale_floats() : 0;
    const int64_t copied_sums = p.lora.adapters ? tokens * round_up(pieces_.size, kGroup) : 0;
    const int64_t copied_g = p.lora.adapters ? tokens * min(p.lora.rank, most_ranks()) : 0;
    const int64_t copied_bytes = 4 * copied_sums + round_up(copied_g * static_cast<int64_t>(sizeof(T)), kCacheLine);
    Carver memory(scratch(ScratchUse::kThread, kTaskBytes + 4 * offset_floats + copied_bytes));
    broadcast_ = memory.take<Word>(tokens * kDepth);
    lanes_ = memory.take<Word>(2 * shape_.piece_words());
    sums_ = memory.take<float>(tokens * width_);
    scales_ = memory.take<float>(2 * scale_floats_);
    copied_sums_ = memory.take<float>(copied_sums);
    copied_g_ = memory.take<T>(copied_g);
  }

  void operator()() {
    begin();
    add_weight();
    finish();
  }

 protected:
  // The sums of the low-rank product.
  void begin() {
    [[maybe_unused]] const WordSession<W> session{};
    if (p_.lora.adapters) return begin_adapters();
    const int64_t rank = p_.lora.rank;
    if (p_.w.n == 0 && rank == 0) __builtin_memset(sums_, 0, static_cast<size_t>(tokens_ * width_) * sizeof(float));
    for (int64_t r = 0; r < rank; r += most_ranks()) add_ranks(r, min(most_ranks(), rank - r));
    if (rank && p_.lora.dropout.active()) {
      drop_sums(p_.lora.dropout, sums_, [this](int64_t t) { return place(t); }, tokens_, p_.w.k, column_, columns_);
    }
  }
  int64_t place(int64_t t) const { return places_ ? places_[token_ + t] : token_ + t; }  // of the task's token t
  void finish() {
    for (int64_t t = 0; t < tokens_; ++t) {
      T* const out = static_cast<T*>(p_.dx) + place(t) * p_.w.k + column_;
      for (int64_t c = 0; c < columns_; c += kGroup) {
        F v[4];
        load_sums(sums_, tokens_, t, c, width_, v);
        decoded_to_memory_order(v);
        for (int q = 0; q < 4; ++q) store_some(out + c + q * kLanes, v[q], columns_ - c - q * kLanes);
      }
    }
  }

 private:
  int64_t most_ranks() const { return shape_.piece_depth * W::kElements; }

  // The same for several adapters: the sums of the tokens of each are computed side by side and moved to their places.
  void begin_adapters() {
    const auto of_task = [this](int64_t t) { return place(t); };
    for_each_adapter(*p_.lora.adapters, tokens_, of_task, [&](const Lora& lora, const int32_t* list, int64_t count) {
      for (int64_t c = 0; c < columns_; c += pieces_.size) {
        const int64_t some = min(pieces_.size, columns_ - c), lanes = round_up(some, kGroup);
        multiply_adapter(lora, list, count, c, some, lanes);
        if (lora.rank && lora.dropout.active()) {
          drop_sums(
              lora.dropout, copied_sums_, [&](int64_t i) { return place(list[i]); }, count, p_.w.k, column_ + c, some);
        }
        for (int64_t l = 0; l < lanes; l += kTileLanes) {
          for (int64_t i = 0; i < count; ++i) {
            float* const to = sums_ + (c + l) * tokens_ + list[i] * kTileLanes;
            const float* const in = copied_sums_ + l * count + i * kTileLanes;
            store(to, load(in));
            store(to + kLanes, load(in + kLanes));
          }
        }
      }
    });
  }

  // Columns [column, column + columns) of the task, and `count` listed tokens, to copied_sums_.
  void multiply_adapter(const Lora& lora, const int32_t* list, int64_t count, int64_t column, int64_t columns,
                        int64_t lanes) {
    if (lora.rank == 0) __builtin_memset(copied_sums_, 0, static_cast<size_t>(count * lanes) * sizeof(float));
    const T* const g = g_ + (token_ - first_token_) * p_.lora.rank;
    for (int64_t rank = 0; rank < lora.rank; rank += most_ranks()) {
      const int64_t ranks = min(most_ranks(), lora.rank - rank);
      if (column == 0 || lora.rank > most_ranks()) {  // else the panel has them
        copy_low_rank(g, p_.lora.rank, list, count, rank, ranks, copied_g_);
        load_broadcast<W>(Matrix<T>{copied_g_, ranks}, 0, count, 0, ranks, broadcast_);
      }
      load_lanes<W, Order::kDecoded>(factor_of<Factor::kRankByFeature, T>(lora, p_.w.k), rank, ranks, column_ + column,
                                     columns, lanes, lanes_);
      WeightLinePrefetcher nothing;
      multiply<W, kChain<T>>(broadcast_, count, lanes_, lanes, static_cast<int>(ceil_div(ranks, W::kElements)),
                             copied_sums_, rank == 0, nothing);
    }
  }

  void add_ranks(int64_t rank, int64_t ranks) {
    const Matrix<T> low{g_, p_.lora.rank}, a{static_cast<const T*>(p_.lora.a), p_.w.k};
    load_broadcast<W>(low, token_ - first_token_, tokens_, rank, ranks, broadcast_);
    for (int64_t c = 0; c < columns_; c += pieces_.size) {
      const int64_t some = min(pieces_.size, columns_ - c), lanes = round_up(some, kGroup);
      load_lanes<W, Order::kDecoded>(a, rank, ranks, column_ + c, some, lanes, lanes_);
      WeightLinePrefetcher nothing;
      multiply<W, kChain<T>>(broadcast_, tokens_, lanes_, lanes, static_cast<int>(ceil_div(ranks, W::kElements)),
                             sums_ + c * tokens_, rank == 0, nothing);
    }
  }

  void add_weight() {
    const Matrix<T> dy{static_cast<const T*>(p_.dy), p_.w.n};
    const Cut slices = cut(p_.w.n, shape_.piece_depth * W::kElements, W::kElements);
    const Pieces pieces{{0, p_.w.n, column_, columns_}, slices.size, pieces_.size};
    const int64_t steps_per_group = kGroup / kTileLanes * ceil_div(tokens_, kAccumulators / 2);
    int64_t steps_between = shape_.interleaved;
    while (shape_.interleaved && 2 * steps_between <= steps_per_group) steps_between *= 2;
    multiply_pieces<W, Becomes::kLanes>(
        p_.w, pieces, lanes_, lanes_ + (shape_.interleaved ? shape_.piece_words() : 0), scales_,
        scales_ + scale_floats_, steps_between, [&](const Piece& piece, const Word* panel, auto& interleaved) {
          if (pieces.begins_strip(piece)) load_broadcast<W>(dy, token_, tokens_, piece.row, piece.rows, broadcast_);
          multiply<W, kChain<T>>(broadcast_, tokens_, panel, round_up(piece.columns, kGroup),
                                 static_cast<int>(ceil_div(piece.rows, W::kElements)),
                                 sums_ + (piece.column - column_) * tokens_, piece.row == 0 && p_.lora.rank == 0,
                                 interleaved);
        });
  }

 protected:
  const LinearDxProblem& p_;
  const T* const g_;
  const int64_t* const places_;
  const int64_t first_token_, token_, tokens_, column_, columns_, width_;
  const DxShape shape_{p_};
  const int64_t scale_floats_ = ScaledPiece::arrays(p_.w) * shape_.scale_floats();
  const Cut pieces_ = cut(columns_, shape_.piece_columns, kGroup);
  Word *broadcast_, *lanes_;
  float *sums_, *scales_, *copied_sums_;
  T* copied_g_;
};

// Runs run_task(token, tokens of the task, column, columns) for rectangles that cover `tokens` tokens and all columns,
// which are multiples of `unit`.
template <class RunTask>
void run_dx_tasks(const Pool& pool, const LinearDxProblem& p, int64_t unit, int64_t tokens, const RunTask& run_task) {
  run_grid(pool, dx_sides(p.w.k, unit, p.m, tokens), run_task);
}

// The dx of `tokens` tokens from `first` on, whose g are given.
template <class W, class T>
void dx_with_g(const Pool& pool, const LinearDxProblem& p, const T* g, int64_t first, int64_t tokens,
               const int64_t* places = nullptr) {
  run_dx_tasks(pool, p, kGroup, tokens, [&](int64_t token, int64_t of_task, int64_t column, int64_t columns) {
    DxTask<W, T>(p, g, first, first + token, of_task, column, columns, places)();
  });
}

// Calls run(g, first, tokens) for tokens first .. first + tokens - 1, until all are done. Their g are computed before.
template <class W, class T, class Run>
void for_tokens_with_g(const Pool& pool, const LinearDxProblem& p, const Run& run) {
  const int64_t some = p.lora.rank && !p.g ? shared_tokens<T>(p.m, p.lora.rank) : p.m;
  const int64_t g_bytes = some * p.lora.rank * static_cast<int64_t>(sizeof(T));
  T* const g = static_cast<T*>(p.g ? p.g : scratch(ScratchUse::kCall, g_bytes));
  for (int64_t first = 0; first < p.m; first += some) {
    const int64_t tokens = min(some, p.m - first);
    if (p.lora.rank) {
      const Matrix<T> dy{static_cast<const T*>(p.dy), p.w.n};
      low_rank_of_call<W, Factor::kFeatureByRank>(pool, dy, p.lora, first, tokens, p.w.n, g);
    }
    run(g, first, tokens);
  }
}

template <class W, class T>
void dx(const Pool& pool, const LinearDxProblem& p) {
  for_tokens_with_g<W, T>(
      pool, p, [&](const T* g, int64_t first, int64_t tokens) { dx_with_g<W, T>(pool, p, g, first, tokens); });
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
