// The fused linear layer for many tokens, y = x · wᵀ + h · bᵀ + bias.
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

// Words of x's panel. With a task's sums (kMostSums), it stays in the second-level cache.
inline constexpr int64_t kMostLaneWords = 64 * 1024;

// A strip of weight rows is decoded piece by piece along the summed dimension into a broadcast panel in the first-level
// cache. Where a piece is decoded during the multiplication of the previous one, each has half of the panel.
struct StripShape {
  static constexpr int64_t kMostRows = 24, kPanelWords = kMostRows * kDepth;
  bool interleaved;
  int64_t rows, other_half;  // words

  // Depends on the whole problem, not on the task, because the order of the sums depends on it.
  explicit StripShape(const LinearProblem& p)
      : interleaved(ScaledPiece::interleaves(p.w)),
        rows(interleaved ? kMostRows / 2 : kMostRows),
        other_half(interleaved ? rows * kDepth : 0) {}
};
inline constexpr int64_t kStripScales = ScaledPiece::scale_floats(StripShape::kMostRows, 2 * kMostLaneWords / kLanes);

// y of tokens [token, token + tokens) and weight rows [row, row + rows). Weight rows are broadcast, tokens are the
// lanes. `h` begins at token `first_token`. If there are `places`, token t of y is row places[t].
template <class W, class T>
class ForwardTask {
 public:
  using Word = typename W::Word;
  static constexpr int kStepElements = W::kElements * W::kWords;
  static constexpr int64_t kRanks = kDepth * W::kElements;  // of h at once
  static constexpr int64_t kBytes = 4 * (StripShape::kPanelWords + kMostLaneWords + kMostSums + 2 * kStripScales);

  ForwardTask(const LinearProblem& p, const T* h, int64_t first_token, int64_t token, int64_t tokens, int64_t row,
              int64_t rows, const int64_t* places = nullptr)
      : p_(p),
        h_(h),
        places_(places),
        first_token_(first_token),
        token_(token),
        tokens_(tokens),
        row_(row),
        rows_(rows) {
    const int64_t offset_floats = p.w.scales.offsets ? 2 * kStripScales : 0;
    const int64_t copied_sums = p.lora.adapters ? StripShape::kMostRows * round_up(token_lanes_, kLanes) : 0;
    const int64_t of_token = multiplies_stack() ? p.lora.adapters->stack_rank : min(p.lora.rank, kRanks);
    const int64_t copied_h = p.lora.adapters ? tokens * of_token : 0;
    const int64_t copied_bytes = 4 * copied_sums + round_up(copied_h * static_cast<int64_t>(sizeof(T)), kCacheLine);
    Carver memory(scratch(ScratchUse::kThread, kTaskBytes + 4 * offset_floats + copied_bytes));
    strip_ = memory.take<Word>(StripShape::kPanelWords);
    lanes_ = memory.take<Word>(kMostLaneWords);
    sums_ = memory.take<float>(rows * round_up(token_lanes_, kLanes));
    scales_ = memory.take<float>(2 * scale_floats_);
    copied_sums_ = memory.take<float>(copied_sums);
    copied_h_ = memory.take<T>(copied_h);
  }

  void operator()() {
    const int64_t rank = p_.lora.rank;
    if (p_.w.k == 0 && (rank == 0 || p_.lora.adapters)) {
      __builtin_memset(sums_, 0, static_cast<size_t>(rows_ * round_up(token_lanes_, kLanes)) * sizeof(float));
    }
    const int64_t most_columns = kMostLaneWords / round_up(tokens_, kLanes) * W::kElements;
    const int64_t columns = max(most_columns / pieces_.size, 1) * pieces_.size;
    for (int64_t c = 0; c < p_.w.k; c += columns) add_columns(c, min(columns, p_.w.k - c));
    finish();
  }

 protected:
  // Adds the low-rank product and the bias, and stores y.
  void finish() {
    [[maybe_unused]] const WordSession<W> session{};
    const int64_t rank = p_.lora.adapters ? 0 : p_.lora.rank;
    if (p_.lora.adapters) add_adapters();
    for (int64_t r = 0; r < rank; r += kRanks) add_ranks(r, min(kRanks, rank - r));
    if constexpr (W::kWords > 1) add_words();
    const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + row_ : nullptr;
    for (int64_t t = 0; t < tokens_; t += kTileLanes) {
      const int64_t some = min(tokens_ - t, kTileLanes);
      store_transposed(sums_ + t * rows_, rows_, tile_width(some), some, bias,
                       static_cast<T*>(p_.y) + (places_ ? 0 : token_ + t) * p_.w.n + row_, p_.w.n,
                       places_ ? places_ + token_ + t : nullptr);
    }
  }

 private:
  // Multiplies columns [column, column + columns) of x with those of the weight.
  void add_columns(int64_t column, int64_t columns) {
    const Matrix<T> x{static_cast<const T*>(p_.x), p_.w.k};
    const int lanes_depth = transpose_lanes<W, Order::kDecoded>(x, token_, tokens_, column, columns, lanes_);
    const Pieces pieces{{row_, rows_, column, columns}, strips_.size, pieces_.size};
    multiply_pieces<W, Becomes::kBroadcast>(
        p_.w, pieces, strip_, strip_ + shape_.other_half, scales_, scales_ + scale_floats_, shape_.interleaved,
        [&](const Piece& piece, const Word* panel, auto& interleaved) {
          multiply_strip(panel, piece.row - row_, piece.rows, lanes_,
                         static_cast<int>(round_up(piece.columns, kGroup) / kStepElements),
                         (piece.column - column) / kStepElements, lanes_depth, piece.column == 0, interleaved);
        });
  }

  void add_ranks(int64_t rank, int64_t ranks) {
    const Matrix<T> low{h_, p_.lora.rank}, b{static_cast<const T*>(p_.lora.b), p_.lora.rank};
    const int depth = transpose_lanes<W, Order::kMemory>(low, token_ - first_token_, tokens_, rank, ranks, lanes_);
    for (int64_t r = 0; r < rows_; r += strips_.size) {
      const int64_t rows = min(strips_.size, rows_ - r);
      load_broadcast<W>(b, row_ + r, rows, rank, ranks, strip_);
      WeightLinePrefetcher nothing;
      multiply_strip(strip_, r, rows, lanes_, depth, 0, depth, p_.w.k == 0 && rank == 0, nothing);
    }
  }

  // Some ranks of an adapter, and the task's tokens that use it.
  struct AdapterPart {
    Matrix<T> b;
    int64_t rank, ranks, count;
    const int32_t* list;
    const Word* lanes;  // h
    int depth;
  };

  // Calls f(lora, list, count) for each adapter of the task's tokens.
  template <class F>
  void for_each_adapter_here(const F& f) const {
    for_each_adapter(
        *p_.lora.adapters, tokens_, [this](int64_t t) { return places_ ? places_[token_ + t] : token_ + t; }, f);
  }
  const T* h_of_task() const { return h_ + (token_ - first_token_) * p_.lora.rank; }

  void add_adapters() { add_each_adapter(multiplies_stack() ? add_stack() : 0); }

  // Whether the stack's B is multiplied as that of a single adapter if the task's tokens use `used` adapters.
  bool multiplies_stack(int64_t used) const {
    constexpr int64_t kStepsPerAdapter = 16;  // that take about as long as moving the sums of an adapter's tokens
    const int64_t ranks = p_.lora.adapters->stack_rank;
    const int64_t steps = ceil_div(ranks, kStepElements) * ceil_div(token_lanes_, kLanes);
    // If the stack were longer than a chain, the order of a sum would depend on the place of its adapter.
    return kChain<T> == kDepth && ranks <= kRanks && used > 1 && steps <= used * kStepsPerAdapter;
  }
  bool multiplies_stack() const { return p_.lora.adapters && multiplies_stack(min(p_.lora.adapters->count, tokens_)); }

  // Adds the products of h and the whole stack for as many of the task's rows as it can, and returns their number. A
  // token's h is zero outside the ranks of its own adapter. That leaves every sum as it is unless another adapter's
  // weights are infinite or NaN, so it stops at the first rows with sums that are not finite.
  int64_t add_stack() {
    const int64_t ranks = p_.lora.adapters->stack_rank;
    const T* const b = static_cast<const T*>(p_.lora.b);
    __builtin_memset(copied_h_, 0, static_cast<size_t>(tokens_ * ranks) * sizeof(T));
    int64_t used = 0;
    bool in_step = true;
    for_each_adapter_here([&](const Lora& lora, const int32_t* list, int64_t count) {
      if (lora.rank == 0) return;
      const int64_t first = static_cast<const T*>(lora.b) - b;
      in_step = in_step && first % kStepElements == 0;
      ++used;
      for (int64_t i = 0; i < count; ++i)
        __builtin_memcpy(copied_h_ + list[i] * ranks + first, h_of_task() + list[i] * p_.lora.rank,
                         static_cast<size_t>(lora.rank) * sizeof(T));
    });
    if (!in_step || !multiplies_stack(used)) return 0;
    const int depth = transpose_lanes<W, Order::kMemory>(Matrix<T>{copied_h_, ranks}, 0, tokens_, 0, ranks, lanes_);
    for (int64_t row = 0; row < rows_; row += strips_.size) {
      const int64_t rows = min(strips_.size, rows_ - row);
      load_broadcast<W>(Matrix<T>{b, ranks}, row_ + row, rows, 0, ranks, strip_);
      WeightLinePrefetcher nothing;
      multiply<W, kChain<T>>(strip_, rows, lanes_, token_lanes_, depth, copied_sums_, true, nothing);
      F zeros = zero();  // unless a sum is infinite or NaN
      for (int64_t i = 0; i < rows * round_up(token_lanes_, kLanes); i += kLanes)
        zeros = multiply_add(load(copied_sums_ + i), zero(), zeros);
      float lanes[kLanes];
      store(lanes, zeros);
      for (const float lane : lanes)
        if (lane != 0.0f) return row;
      for (int64_t l = 0; l < token_lanes_; l += kTileLanes) {
        const int64_t width = tile_width(token_lanes_ - l);
        add_slice(copied_sums_ + l * rows, rows * width, sums_ + l * rows_ + row * width, false);
      }
    }
    return rows_;
  }

  // Adds the low-rank product of each adapter to the sums of its tokens, for rows [first_row, rows_). The stack's rows
  // of B are read in their order, once for all adapters whose h fits lanes_: an adapter's part of a row is often less
  // than a cache line.
  void add_each_adapter(int64_t first_row) {
    if (first_row == rows_) return;
    constexpr int64_t kMostParts = 64;
    AdapterPart parts[kMostParts];
    int32_t lists[kMostTokens];
    int32_t* next_list = lists;
    Word* next_lanes = lanes_;
    int64_t found = 0;
    for_each_adapter_here([&](const Lora& lora, const int32_t* list, int64_t count) {
      __builtin_memcpy(next_list, list, static_cast<size_t>(count) * sizeof(*list));
      for (int64_t rank = 0; rank < lora.rank; rank += kRanks) {
        const int64_t ranks = min(kRanks, lora.rank - rank);
        const int64_t most_words = round_up(count * W::kWords, kLanes) * round_up(ranks, kLanes);
        if (found == kMostParts || next_lanes + most_words > lanes_ + kMostLaneWords) {
          add_parts(parts, found, first_row);
          next_lanes = lanes_;
          found = 0;
        }
        copy_low_rank(h_of_task(), p_.lora.rank, list, count, rank, ranks, copied_h_);
        const Matrix<T> of_tokens{copied_h_, ranks};
        const int depth = transpose_lanes<W, Order::kMemory>(of_tokens, 0, count, 0, ranks, next_lanes);
        parts[found++] = {
            factor_of<Factor::kFeatureByRank, T>(lora, p_.w.n), rank, ranks, count, next_list, next_lanes, depth};
        next_lanes += round_up(count * W::kWords, kLanes) * depth;
      }
      next_list += count;
    });
    add_parts(parts, found, first_row);
  }

  // Unless a part has all tokens, their sums are moved side by side and back.
  void add_parts(const AdapterPart* parts, int64_t count, int64_t first_row) {
    for (int64_t row = first_row; row < rows_; row += strips_.size) {
      const int64_t rows = min(strips_.size, rows_ - row);
      for (const AdapterPart* part = parts; part < parts + count; ++part) {
        load_broadcast<W>(part->b, row_ + row, rows, part->rank, part->ranks, strip_);
        WeightLinePrefetcher nothing;
        if (part->count == tokens_) {
          multiply_strip(strip_, row, rows, part->lanes, part->depth, 0, part->depth, false, nothing);
          continue;
        }
        move_sums<false>(row, rows, part->list, part->count);
        multiply<W, kChain<T>>(strip_, rows, part->lanes, part->count * W::kWords, part->depth, copied_sums_, false,
                               nothing);
        move_sums<true>(row, rows, part->list, part->count);
      }
    }
  }

  // Copies the sums of the task's rows [row, row + rows) and the listed tokens to copied_sums_, or back. Neighbours in
  // a vector are copied together.
  template <bool kBack>
  void move_sums(int64_t row, int64_t rows, const int32_t* list, int64_t count) {
    const int64_t lanes = count * W::kWords;
    const auto lane_of = [&](int64_t lane) { return list[lane / W::kWords] * W::kWords + lane % W::kWords; };
    for (int64_t lane = 0, some; lane < lanes; lane += some) {
      const int64_t from = lane_of(lane);
      const int64_t tile = from & -kTileLanes, width = tile_width(token_lanes_ - tile);
      const int64_t copied_tile = lane & -kTileLanes, copied_width = tile_width(lanes - copied_tile);
      float* sum = sums_ + tile * rows_ + row * width + from - tile;
      float* copied = copied_sums_ + copied_tile * rows + lane - copied_tile;
      const int64_t most = min(lanes - lane, kLanes - max(lane % kLanes, from % kLanes));
      some = 1;
      while (some < most && lane_of(lane + some) == from + some) ++some;
      const auto copy = [&](auto size) {
        some = size.value;
        for (int64_t r = 0; r < rows; ++r, sum += width, copied += copied_width)
          __builtin_memcpy(kBack ? sum : copied, kBack ? copied : sum, sizeof(float) * size.value);
      };
      if (some == kLanes) {
        copy(Index<kLanes>{});
      } else if (some >= 4) {
        copy(Index<4>{});
      } else {
        copy(Index<1>{});
      }
    }
  }

  // Multiplies the panel of the task's rows [row, row + rows) with steps [at, at + depth) of the lanes, and adds to
  // their sums.
  template <class Interleaved>
  void multiply_strip(const Word* panel, int64_t row, int64_t rows, const Word* lanes, int depth, int64_t at,
                      int64_t lanes_depth, bool first, Interleaved& interleaved) {
    for (int64_t l = 0; l < token_lanes_; l += kTileLanes) {
      const int64_t some = min(token_lanes_ - l, kTileLanes), width = tile_width(some);
      multiply<W, kChain<T>>(panel, rows, lanes + l * lanes_depth + at * width, some, depth,
                             sums_ + l * rows_ + row * width, first, interleaved);
    }
  }

  // Adds the two lanes that a token has with TwoWords.
  void add_words() {
    const int64_t width = tile_width(token_lanes_);
    for (int64_t r = 0; r < rows_; ++r) {
      const float* const in = sums_ + r * width;
      store(sums_ + r * kLanes, W::add_neighbours(load(in), width == kTileLanes ? load(in + kLanes) : zero()));
    }
  }

 protected:
  const LinearProblem& p_;
  const T* const h_;
  const int64_t* const places_;
  const int64_t first_token_, token_, tokens_, token_lanes_ = tokens_ * W::kWords, row_, rows_;
  const StripShape shape_{p_};
  const int64_t scale_floats_ = ScaledPiece::arrays(p_.w) * kStripScales;
  const Cut strips_ = cut(rows_, shape_.rows, 1), pieces_ = cut(p_.w.k, kDepth* W::kElements, kGroup);
  Word *strip_, *lanes_;
  float *sums_, *scales_, *copied_sums_;
  T* copied_h_;
};

// Runs run_task(token, tokens of the task, row, rows) for rectangles that cover `tokens` tokens and all rows.
template <class RunTask>
void run_forward_tasks(const Pool& pool, const Weight& w, int64_t tokens, const RunTask& run_task) {
  run_grid(pool, forward_sides(kVectorUnit, w.n, tokens), run_task);
}

// Runs a ForwardTask with the word that suits the problem's number of tokens.
template <class W, class T>
void forward_task(const LinearProblem& p, const T* h, int64_t first_token, int64_t token, int64_t tokens, int64_t row,
                  int64_t rows, const int64_t* places) {
  static_assert(ForwardTask<W, T>::kBytes <= kTaskBytes);
  if (p.m <= kLanes) {
    ForwardTask<typename W::FewLanes, T>(p, h, first_token, token, tokens, row, rows, places)();
  } else {
    ForwardTask<W, T>(p, h, first_token, token, tokens, row, rows, places)();
  }
}

// The forward of `tokens` tokens from `first` on, whose h are given. If there are `places`, token t of y is row
// places[t].
template <class W, class T>
void forward_with_h(const Pool& pool, const LinearProblem& p, const T* h, int64_t first, int64_t tokens,
                    const int64_t* places = nullptr) {
  run_forward_tasks(pool, p.w, tokens, [&](int64_t token, int64_t of_task, int64_t row, int64_t rows) {
    forward_task<W>(p, h, first, first + token, of_task, row, rows, places);
  });
}

template <class W, class T>
void forward(const Pool& pool, const LinearProblem& p) {
  const int64_t some = p.lora.rank && !p.h ? shared_tokens<T>(p.m, p.lora.rank) : p.m;
  const int64_t h_bytes = some * p.lora.rank * static_cast<int64_t>(sizeof(T));
  T* const h = static_cast<T*>(p.h ? p.h : scratch(ScratchUse::kCall, h_bytes));
  for (int64_t first = 0; first < p.m; first += some) {
    const int64_t tokens = min(some, p.m - first);
    if (p.lora.rank) {
      const Matrix<T> x{static_cast<const T*>(p.x), p.w.k};
      low_rank_of_call<W, Factor::kRankByFeature>(pool, x, p.lora, first, tokens, p.w.k, h);
    }
    forward_with_h<W, T>(pool, p, h, first, tokens);
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
