// The fused linear layer and its input gradient for many tokens. Included inside the kernels' anonymous namespace.
//
// Each task owns a block of the output and sums it in float32 scratch: a block of the packed weight is decoded into a
// panel that stays in the second-level cache and is multiplied with all tokens of the task, then the next along the
// summed dimension; the low-rank product is one more of them. An element's sum has the same order whatever the tasks,
// so the result does not depend on the number of threads.
#pragma once

#include "cpp/cpu/many_tokens/low_rank-inl.h"
#include "cpp/cpu/many_tokens/weight-inl.h"

// Tokens of which h or g, [tokens, rank], fits the scratch of a call.
template <class T>
inline int64_t shared_tokens(int64_t tokens, int64_t rank) {
  const int64_t fit = at_least(kCallBytes / (at_least(rank, 1) * static_cast<int64_t>(sizeof(T))), 1);
  return fit < tokens && fit > 2 * kTileLanes ? fit & -kTileLanes : at_most(fit, tokens);
}

inline constexpr int64_t kMostTokens = 256;  // of a task
// Words of x's panel, and floats of a task's sums: together they stay in the second-level cache.
inline constexpr int64_t kMostLaneWords = 64 * 1024, kMostSums = 180 * 1024;

// A strip of weight rows is decoded piece by piece along the summed dimension into a rows panel in the first-level
// cache. Where a piece is decoded beside the multiplication of the one before it, either has half of the panel.
struct StripShape {
  static constexpr int64_t kMostRows = 24, kPanelWords = kMostRows * kDepth;
  bool beside;
  int64_t rows, other_half;  // words

  // By the whole problem, not by the task, since the order of the sums depends on it.
  explicit StripShape(const LinearProblem& p)
      : beside(kSpareRegisters && WeightTile::aligned(p.w)),
        rows(beside ? kMostRows / 2 : kMostRows),
        other_half(beside ? rows * kDepth : 0) {}
};
inline constexpr int64_t kStripScales = WeightTile::scale_floats(StripShape::kMostRows, 2 * kMostLaneWords / kLanes);

// y[token .. token + tokens)[row .. row + rows), with h's first row at `first_token`. Weight rows are the broadcast
// rows, tokens the lanes.
template <class W, class T>
class ForwardBlock {
 public:
  using Word = typename W::Word;
  static constexpr int kStepElements = W::kElements * W::kWords;
  static constexpr int64_t kBytes = 4 * (StripShape::kPanelWords + kMostLaneWords + kMostSums + 2 * kStripScales);

  ForwardBlock(const LinearProblem& p, const T* h, int64_t first_token, int64_t token, int64_t tokens, int64_t row,
               int64_t rows)
      : p_(p), h_(h), first_token_(first_token), token_(token), tokens_(tokens), row_(row), rows_(rows) {
    Arena arena;
    strip_ = arena.take<Word>(StripShape::kPanelWords);
    lanes_ = arena.take<Word>(kMostLaneWords);
    sums_ = arena.take<float>(rows * round_up(token_lanes_, kLanes));
    scales_ = arena.take<float>(2 * kStripScales);
  }

  void operator()() {
    const int64_t rank = p_.lora.rank;
    if (p_.w.k == 0 && rank == 0) {
      __builtin_memset(sums_, 0, static_cast<size_t>(rows_ * round_up(token_lanes_, kLanes)) * sizeof(float));
    }
    const int64_t most_columns = kMostLaneWords / round_up(tokens_, kLanes) * W::kElements;
    const int64_t columns = at_least(most_columns / pieces_.size, 1) * pieces_.size;
    for (int64_t c = 0; c < p_.w.k; c += columns) add_columns(c, at_most(columns, p_.w.k - c));
    for (int64_t r = 0; r < rank; r += kDepth * W::kElements) add_ranks(r, at_most(kDepth * W::kElements, rank - r));
    if constexpr (W::kWords > 1) add_words();
    const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + row_ : nullptr;
    for (int64_t t = 0; t < tokens_; t += kTileLanes) {
      const int64_t some = at_most(tokens_ - t, kTileLanes);
      store_transposed(sums_ + t * rows_, rows_, tile_width(some), some, bias,
                       static_cast<T*>(p_.y) + (token_ + t) * p_.w.n + row_, p_.w.n);
    }
  }

 private:
  // Columns [column, column + columns) of x times those of the weight.
  void add_columns(int64_t column, int64_t columns) {
    const Matrix<T> x{static_cast<const T*>(p_.x), p_.w.k};
    const int lanes_depth = transpose_lanes<W, Order::kDecoded>(x, token_, tokens_, column, columns, lanes_);
    const Pieces pieces{{row_, rows_, column, columns}, strips_.size, pieces_.size};
    multiply_pieces<W, Becomes::kRows>(
        p_.w, pieces, strip_, strip_ + shape_.other_half, scales_, scales_ + kStripScales, shape_.beside,
        [&](const Piece& piece, const Word* panel, auto& beside) {
          multiply_strip(panel, piece.row - row_, piece.rows,
                         static_cast<int>(round_up(piece.columns, kGroup) / kStepElements),
                         (piece.column - column) / kStepElements, lanes_depth, piece.column == 0, beside);
        });
  }

  void add_ranks(int64_t rank, int64_t ranks) {
    const Matrix<T> low{h_, p_.lora.rank}, b{static_cast<const T*>(p_.lora.b), p_.lora.rank};
    const int depth = transpose_lanes<W, Order::kMemory>(low, token_ - first_token_, tokens_, rank, ranks, lanes_);
    for (int64_t r = 0; r < rows_; r += strips_.size) {
      const int64_t rows = at_most(strips_.size, rows_ - r);
      load_rows<W>(b, row_ + r, rows, rank, ranks, strip_);
      Ahead nothing;
      multiply_strip(strip_, r, rows, depth, 0, depth, p_.w.k == 0 && rank == 0, nothing);
    }
  }

  // Adds to the sums of the block's rows [row, row + rows) their panel times the steps [at, at + depth) of the lanes.
  template <class Beside>
  void multiply_strip(const Word* panel, int64_t row, int64_t rows, int depth, int64_t at, int64_t lanes_depth,
                      bool first, Beside& beside) {
    for (int64_t l = 0; l < token_lanes_; l += kTileLanes) {
      const int64_t some = at_most(token_lanes_ - l, kTileLanes), width = tile_width(some);
      multiply<W, kChain<T>>(panel, rows, lanes_ + l * lanes_depth + at * width, some, depth,
                             sums_ + l * rows_ + row * width, first, beside);
    }
  }

  // Leaves one lane a token in the sums.
  void add_words() {
    const int64_t width = tile_width(token_lanes_);
    for (int64_t r = 0; r < rows_; ++r) {
      const float* const in = sums_ + r * width;
      store(sums_ + r * kLanes, W::add_neighbours(load(in), width == kTileLanes ? load(in + kLanes) : zero()));
    }
  }

  const LinearProblem& p_;
  const T* const h_;
  const int64_t first_token_, token_, tokens_, token_lanes_ = tokens_ * W::kWords, row_, rows_;
  const StripShape shape_{p_};
  const Cut strips_ = cut(rows_, shape_.rows, 1), pieces_ = cut(p_.w.k, kDepth* W::kElements, kGroup);
  Word *strip_, *lanes_;
  float *sums_, *scales_;
};

template <class W, class T>
void linear(const Pool& pool, const LinearProblem& p) {
  static_assert(ForwardBlock<W, T>::kBytes <= kTaskBytes);
  const int64_t some = p.lora.rank ? shared_tokens<T>(p.m, p.lora.rank) : p.m;
  T* const h = static_cast<T*>(scratch(ScratchUse::kCall, some * p.lora.rank * static_cast<int64_t>(sizeof(T))));
  for (int64_t first = 0; first < p.m; first += some) {
    const int64_t tokens = at_most(some, p.m - first);
    if (p.lora.rank) {
      const Matrix<T> x{static_cast<const T*>(p.x), p.w.k, p.lora.dropout};
      const Matrix<T> a{static_cast<const T*>(p.lora.a), p.w.k};
      project<W, Factor::kRankByFeature>(pool, x, first, tokens, p.w.k, a, 0, p.lora.rank, p.lora.scaling,
                                         Projected<T>{h, p.lora.rank, 1});
    }
    constexpr int64_t kUnit = kAccumulators / 2;
    const int64_t most_rows = kMostSums / at_most(round_up(tokens, kTileLanes), kMostTokens) / kUnit * kUnit;
    const Grid grid = make_grid(pool.threads, p.w.n, most_rows, kUnit, tokens, kMostTokens);
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % grid.rows.count * grid.rows.size, token = i / grid.rows.count * grid.tokens.size;
        const auto compute = [&](auto word) {
          ForwardBlock<decltype(word), T> block(p, h, first, first + token, at_most(grid.tokens.size, tokens - token),
                                                row, at_most(grid.rows.size, p.w.n - row));
          block();
        };
        if (p.m <= kLanes) {
          compute(typename W::FewTokens{});
        } else {
          compute(W{});
        }
      }
    };
    pool(grid.tasks(), 1, body);
  }
}

// The dropout of dx's low-rank part, in place on sums whose lanes are columns in decoded order.
inline void drop_sums(const Dropout& d, float* sums, int64_t token, int64_t tokens, int64_t k, int64_t column,
                      int64_t columns) {
  const Scale keep_scale(d.keep_scale);
  const F all = splat(1.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t first = 0; first < columns; first += Mask::kMax) {
      const Mask mask(d, (token + t) * k + column + first, at_most(columns - first, Mask::kMax));
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

// How many columns a task takes, and the pieces it decodes: with few tokens, as much at a time as the first-level cache
// holds. With many, decoding hardly counts, and deeper pieces add to the sums less often. A piece decoded beside the
// multiplication of the one before it has a panel of its own.
struct DxShape {
  bool beside;
  int64_t most_columns, piece_columns, piece_depth;

  // By the whole problem, not by the task, since the order of the sums depends on it.
  explicit DxShape(const LinearDxProblem& p) : DxShape(p.m, kSpareRegisters && WeightTile::aligned(p.w)) {}
  constexpr DxShape(int64_t m, bool beside_)
      : beside(beside_),
        most_columns(m <= kFewTokens ? 2048 : 512),
        piece_columns(m <= kFewTokens && beside ? kGroup : 2 * kGroup),
        piece_depth(m <= kFewTokens ? 64 : kDepth / 2) {}

  constexpr int64_t piece_words() const { return piece_columns * piece_depth; }
  constexpr int64_t scale_floats() const { return WeightTile::scale_floats(2 * piece_depth, most_columns); }
  constexpr int64_t bytes(int64_t tokens) const {
    return 4 * (tokens * kDepth + 2 * piece_words() + tokens * most_columns + 2 * scale_floats());
  }
  static constexpr int64_t kFewTokens = 64;
};
static_assert(DxShape(DxShape::kFewTokens, true).bytes(DxShape::kFewTokens) <= kTaskBytes);
static_assert(DxShape(kMostTokens, true).bytes(kMostTokens) <= kTaskBytes);

// dx[token .. token + tokens)[column .. column + columns), with g's first row at `first_token`. Tokens are the
// broadcast rows, columns the lanes. The low-rank product comes first, since dropout acts on it alone.
template <class W, class T>
class BackwardBlock {
 public:
  using Word = typename W::Word;

  BackwardBlock(const LinearDxProblem& p, const T* g, int64_t first_token, int64_t token, int64_t tokens,
                int64_t column, int64_t columns)
      : p_(p),
        g_(g),
        first_token_(first_token),
        token_(token),
        tokens_(tokens),
        column_(column),
        columns_(columns),
        width_(round_up(columns, kGroup)) {
    Arena arena;
    gradients_ = arena.take<Word>(tokens * kDepth);
    lanes_ = arena.take<Word>(2 * shape_.piece_words());
    sums_ = arena.take<float>(tokens * width_);
    scales_ = arena.take<float>(2 * shape_.scale_floats());
  }

  void operator()() {
    const int64_t rank = p_.lora.rank;
    if (p_.w.n == 0 && rank == 0) __builtin_memset(sums_, 0, static_cast<size_t>(tokens_ * width_) * sizeof(float));
    const int64_t most_ranks = shape_.piece_depth * W::kElements;
    for (int64_t r = 0; r < rank; r += most_ranks) add_ranks(r, at_most(most_ranks, rank - r));
    if (rank && p_.lora.dropout.active()) drop_sums(p_.lora.dropout, sums_, token_, tokens_, p_.w.k, column_, columns_);
    add_weight();
    for (int64_t t = 0; t < tokens_; ++t) {
      T* const out = static_cast<T*>(p_.dx) + (token_ + t) * p_.w.k + column_;
      for (int64_t c = 0; c < columns_; c += kGroup) {
        F v[4];
        load_sums(sums_, tokens_, t, c, width_, v);
        decoded_to_memory_order(v);
        for (int q = 0; q < 4; ++q) store_some(out + c + q * kLanes, v[q], columns_ - c - q * kLanes);
      }
    }
  }

 private:
  void add_ranks(int64_t rank, int64_t ranks) {
    const Matrix<T> low{g_, p_.lora.rank}, a{static_cast<const T*>(p_.lora.a), p_.w.k};
    load_rows<W>(low, token_ - first_token_, tokens_, rank, ranks, gradients_);
    for (int64_t c = 0; c < columns_; c += pieces_.size) {
      const int64_t some = at_most(pieces_.size, columns_ - c), lanes = round_up(some, kGroup);
      load_lanes<W, Order::kDecoded>(a, rank, ranks, column_ + c, some, lanes, lanes_);
      Ahead nothing;
      multiply<W, kChain<T>>(gradients_, tokens_, lanes_, lanes, static_cast<int>(ceil_div(ranks, W::kElements)),
                             sums_ + c * tokens_, rank == 0, nothing);
    }
  }

  void add_weight() {
    const Matrix<T> dy{static_cast<const T*>(p_.dy), p_.w.n};
    const Cut slices = cut(p_.w.n, shape_.piece_depth * W::kElements, W::kElements);
    const Pieces pieces{{0, p_.w.n, column_, columns_}, slices.size, pieces_.size};
    const int64_t steps_a_group = kGroup / kTileLanes * ceil_div(tokens_, kAccumulators / 2);
    int64_t every = shape_.beside;
    while (shape_.beside && 2 * every <= steps_a_group) every *= 2;
    multiply_pieces<W, Becomes::kLanes>(
        p_.w, pieces, lanes_, lanes_ + (shape_.beside ? shape_.piece_words() : 0), scales_,
        scales_ + shape_.scale_floats(), every, [&](const Piece& piece, const Word* panel, auto& beside) {
          if (pieces.begins_strip(piece)) load_rows<W>(dy, token_, tokens_, piece.row, piece.rows, gradients_);
          multiply<W, kChain<T>>(gradients_, tokens_, panel, round_up(piece.columns, kGroup),
                                 static_cast<int>(ceil_div(piece.rows, W::kElements)),
                                 sums_ + (piece.column - column_) * tokens_, piece.row == 0 && p_.lora.rank == 0,
                                 beside);
        });
  }

  const LinearDxProblem& p_;
  const T* const g_;
  const int64_t first_token_, token_, tokens_, column_, columns_, width_;
  const DxShape shape_{p_};
  const Cut pieces_ = cut(columns_, shape_.piece_columns, kGroup);
  Word *gradients_, *lanes_;
  float *sums_, *scales_;
};

template <class W, class T>
void linear_dx(const Pool& pool, const LinearDxProblem& p) {
  const DxShape shape(p);
  const int64_t some = p.lora.rank ? shared_tokens<T>(p.m, p.lora.rank) : p.m;
  T* const g = static_cast<T*>(scratch(ScratchUse::kCall, some * p.lora.rank * static_cast<int64_t>(sizeof(T))));
  for (int64_t first = 0; first < p.m; first += some) {
    const int64_t tokens = at_most(some, p.m - first);
    if (p.lora.rank) {
      const Matrix<T> dy{static_cast<const T*>(p.dy), p.w.n}, b{static_cast<const T*>(p.lora.b), p.lora.rank};
      project<W, Factor::kFeatureByRank>(pool, dy, first, tokens, p.w.n, b, 0, p.lora.rank, p.lora.scaling,
                                         Projected<T>{g, p.lora.rank, 1});
    }
    const Grid grid = make_grid(pool.threads, p.w.k, shape.most_columns, kGroup, tokens, kMostTokens);
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % grid.rows.count * grid.rows.size, token = i / grid.rows.count * grid.tokens.size;
        BackwardBlock<W, T> block(p, g, first, first + token, at_most(grid.tokens.size, tokens - token), column,
                                  at_most(grid.rows.size, p.w.k - column));
        block();
      }
    };
    pool(grid.tasks(), 1, body);
  }
}
