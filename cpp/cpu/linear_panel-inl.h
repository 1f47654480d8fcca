// The fused linear layer and its input gradient for many tokens. Included inside the kernels' anonymous namespace.
//
// Each task owns a block of the output and sums it in float32 scratch: a block of the packed weight is decoded into a
// panel that stays in the second-level cache and is multiplied with all tokens of the task, then the next along the
// summed dimension; the low-rank product is one more of them. An element's sum has the same order whatever the tasks,
// so the result does not depend on the number of threads.
#pragma once

#include "cpp/cpu/project-inl.h"
#include "cpp/cpu/weight-inl.h"

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
  int64_t rows, depth, other_half;  // words

  // By the whole problem, not by the task, since the order of the sums depends on it.
  explicit StripShape(const LinearProblem& p)
      : beside(kSpareRegisters && aligned(p.w) && rows_begin_blocks(p.w)),
        rows(kMostRows),
        depth(kDepth),
        other_half(0) {
    if (!beside) return;
    if (p.m <= kLanes) {
      depth = other_half = kDepth / 2;
    } else {
      rows = kMostRows / 2, other_half = rows * kDepth;
    }
  }
};
inline constexpr int64_t kStripScales = WeightTile::scale_floats(StripShape::kMostRows, 2 * kMostLaneWords / kLanes);

// y[token .. token + tokens)[row .. row + rows), with h's first row at `first_token`. Weight rows are the broadcast
// rows, tokens the lanes.
template <class W, class T>
class ForwardBlock {
 public:
  using Word = typename W::Word;
  static constexpr int64_t kBytes = 4 * (StripShape::kPanelWords + kMostLaneWords + kMostSums + 2 * kStripScales);

  ForwardBlock(const LinearProblem& p, const T* h, int64_t first_token, int64_t token, int64_t tokens, int64_t row,
               int64_t rows)
      : p_(p), h_(h), first_token_(first_token), token_(token), tokens_(tokens), row_(row), rows_(rows) {
    Arena arena;
    strip_ = arena.take<Word>(StripShape::kPanelWords);
    lanes_ = arena.take<Word>(kMostLaneWords);
    sums_ = arena.take<float>(rows * round_up(tokens, kLanes));
    scales_ = arena.take<float>(2 * kStripScales);
  }

  void operator()() {
    const int64_t rank = p_.lora.rank;
    if (p_.w.k == 0 && rank == 0) {
      __builtin_memset(sums_, 0, static_cast<size_t>(rows_ * round_up(tokens_, kLanes)) * sizeof(float));
    }
    const int64_t most_columns = kMostLaneWords / round_up(tokens_, kLanes) * W::kElements;
    const int64_t columns = at_least(most_columns / pieces_.size, 1) * pieces_.size;
    for (int64_t c = 0; c < p_.w.k; c += columns) add_columns(c, at_most(columns, p_.w.k - c));
    for (int64_t r = 0; r < rank; r += kDepth * W::kElements) add_ranks(r, at_most(kDepth * W::kElements, rank - r));
    const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + row_ : nullptr;
    for (int64_t t = 0; t < tokens_; t += kTileLanes) {
      const int64_t some = at_most(tokens_ - t, kTileLanes);
      store_transposed(sums_ + t * rows_, rows_, tile_width(some), some, bias,
                       static_cast<T*>(p_.y) + (token_ + t) * p_.w.n + row_, p_.w.n);
    }
  }

 private:
  // Of the weight: rows [row, row + rows) of the block, columns [column, column + columns) of those at hand.
  struct Piece {
    int64_t row, rows, column, columns;
  };

  void add_columns(int64_t column, int64_t columns) {
    const Matrix<T> x{static_cast<const T*>(p_.x), p_.w.k};
    const int lanes_depth = transpose_lanes<W, Order::kDecoded>(x, token_, tokens_, column, columns, lanes_);
    const auto piece_at = [&](int64_t r, int64_t c) {
      return Piece{r, at_most(strips_.size, rows_ - r), c, at_most(pieces_.size, columns - c)};
    };
    const auto after = [&](const Piece& piece) {
      const int64_t c = piece.column + piece.columns;
      return c < columns ? piece_at(piece.row, c) : piece_at(piece.row + piece.rows, 0);
    };
    const auto tile_of = [&](const Piece& piece) {
      float* const scales = scales_ + piece.row / strips_.size % 2 * kStripScales;
      return WeightTile(p_.w, row_ + piece.row, piece.rows, column, columns, scales);
    };

    Piece piece = piece_at(0, 0);
    WeightTile tile = tile_of(piece);
    decode_rows<W>(tile, row_, piece.rows, column, piece.columns, strip_);
    for (int half = 0; piece.rows > 0; half ^= 1) {
      Word* const panel = strip_ + half * shape_.other_half;
      Word* const other = strip_ + (half ^ 1) * shape_.other_half;
      const int depth = static_cast<int>(round_up(piece.columns, kGroup) / W::kElements);
      const Piece next = after(piece);
      const int64_t row = row_ + next.row, c = column + next.column;
      const auto multiply_beside = [&](auto&& work) {
        multiply_strip(panel, piece.row, piece.rows, depth, piece.column / W::kElements, lanes_depth,
                       column == 0 && piece.column == 0, work);
      };
      if (next.rows == 0) {
        multiply_beside(Ahead());
      } else {
        if (next.column == 0) tile = tile_of(next);
        if (shape_.beside) {
          const Piece last = after(next);
          const int64_t distance = ((last.row - next.row) * p_.w.k + last.column - next.column) / 2;
          DecodeAhead<W> decode(tile, row, next.rows, c, next.columns, other, distance);
          multiply_beside(decode);
          decode.finish();
        } else {
          multiply_beside(packed_ahead(p_.w, row, next.rows, c, next.columns));
          decode_rows<W>(tile, row, next.rows, c, next.columns, other);
        }
      }
      piece = next;
    }
  }

  void add_ranks(int64_t rank, int64_t ranks) {
    const Matrix<T> low{h_, p_.lora.rank}, b{static_cast<const T*>(p_.lora.b), p_.lora.rank};
    const int depth = transpose_lanes<W, Order::kMemory>(low, token_ - first_token_, tokens_, rank, ranks, lanes_);
    for (int64_t r = 0; r < rows_; r += strips_.size) {
      const int64_t rows = at_most(strips_.size, rows_ - r);
      load_rows<W>(b, row_ + r, rows, rank, ranks, strip_);
      multiply_strip(strip_, r, rows, depth, 0, depth, p_.w.k == 0 && rank == 0, Ahead());
    }
  }

  // Adds to the sums of the block's rows [row, row + rows) their panel times the words [at, at + depth) of the lanes.
  template <class Beside>
  void multiply_strip(const Word* panel, int64_t row, int64_t rows, int depth, int64_t at, int64_t lanes_depth,
                      bool first, Beside&& beside) {
    for (int64_t t = 0; t < tokens_; t += kTileLanes) {
      const int64_t some = at_most(tokens_ - t, kTileLanes), width = tile_width(some);
      multiply<W, kChain<T>>(panel, rows, lanes_ + t * lanes_depth + at * width, some, depth,
                             sums_ + t * rows_ + row * width, first, beside);
    }
  }

  const LinearProblem& p_;
  const T* const h_;
  const int64_t first_token_, token_, tokens_, row_, rows_;
  const StripShape shape_{p_};
  const Cut strips_ = cut(rows_, shape_.rows, 1), pieces_ = cut(p_.w.k, shape_.depth* W::kElements, kGroup);
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
        ForwardBlock<W, T> block(p, h, first, first + token, at_most(grid.tokens.size, tokens - token), row,
                                 at_most(grid.rows.size, p.w.n - row));
        block();
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
// holds. With many, decoding hardly counts, and deeper pieces add to the sums less often.
struct DxShape {
  int64_t most_columns, piece_columns, piece_depth;

  constexpr int64_t scale_floats() const { return WeightTile::scale_floats(2 * piece_depth, most_columns); }
  constexpr int64_t floats(int64_t tokens) const {
    return tokens * kDepth + piece_columns * piece_depth + tokens * most_columns + scale_floats();
  }
};
inline constexpr int64_t kFewTokens = 64;
inline constexpr DxShape kFewTokensShape{2048, 2 * kGroup, 64}, kManyTokensShape{512, 2 * kGroup, kDepth / 2};
static_assert(kFewTokensShape.floats(kFewTokens) * 4 <= kTaskBytes);
static_assert(kManyTokensShape.floats(kMostTokens) * 4 <= kTaskBytes);

// dx[token .. token + tokens)[column .. column + columns), with g's first row at `first_token`. Tokens are the
// broadcast rows, columns the lanes. The low-rank product comes first, since dropout acts on it alone.
template <class W, class T>
void backward_block(const LinearDxProblem& p, const DxShape& shape, const T* g, int64_t first_token, int64_t token,
                    int64_t tokens, int64_t column, int64_t columns) {
  using Word = typename W::Word;
  const int64_t width = round_up(columns, kGroup);
  Arena arena;
  Word* const gradients = arena.take<Word>(tokens * kDepth);
  Word* const lanes = arena.take<Word>(shape.piece_columns * shape.piece_depth);
  float* const sums = arena.take<float>(tokens * width);
  float* const scales = arena.take<float>(shape.scale_floats());
  bool first = true;

  const Cut pieces = cut(columns, shape.piece_columns, kGroup);
  Ahead nothing;
  const Matrix<T> low{g, p.lora.rank}, a{static_cast<const T*>(p.lora.a), p.w.k};
  for (int64_t r = 0; r < p.lora.rank; r += shape.piece_depth * W::kElements, first = false) {
    const int64_t ranks = at_most(shape.piece_depth * W::kElements, p.lora.rank - r);
    load_rows<W>(low, token - first_token, tokens, r, ranks, gradients);
    for (int64_t c = 0; c < columns; c += pieces.size) {
      const int64_t some = at_most(pieces.size, columns - c), some_lanes = round_up(some, kGroup);
      load_lanes<W, Order::kDecoded>(a, r, ranks, column + c, some, some_lanes, lanes);
      multiply<W, kChain<T>>(gradients, tokens, lanes, some_lanes, static_cast<int>(ceil_div(ranks, W::kElements)),
                             sums + c * tokens, first, nothing);
    }
  }
  if (p.lora.rank && p.lora.dropout.active()) drop_sums(p.lora.dropout, sums, token, tokens, p.w.k, column, columns);

  const Matrix<T> dy{static_cast<const T*>(p.dy), p.w.n};
  const Cut blocks = cut(p.w.n, kDepth * W::kElements, W::kElements);
  for (int64_t n = 0; n < p.w.n; n += blocks.size) {
    const int64_t block_rows = at_most(blocks.size, p.w.n - n);
    load_rows<W>(dy, token, tokens, n, block_rows, gradients);
    const Cut slices = cut(block_rows, shape.piece_depth * W::kElements, W::kElements);
    for (int64_t s = 0; s < block_rows; s += slices.size, first = false) {
      const int64_t rows = at_most(slices.size, block_rows - s);
      const int depth = static_cast<int>(ceil_div(rows, W::kElements));
      const WeightTile tile(p.w, n + s, rows, column, columns, scales);
      for (int64_t c = 0; c < columns; c += pieces.size) {
        const int64_t some = at_most(pieces.size, columns - c), some_lanes = round_up(some, kGroup);
        decode_lanes<W>(tile, n + s, rows, column + c, some, lanes);
        Ahead ahead = c + some < columns
                          ? packed_ahead(p.w, n + s, rows, column + c + some, at_most(some, columns - c - some))
                          : packed_ahead(p.w, n + s + rows, slices.size, column, pieces.size);
        multiply<W, kChain<T>>(gradients + s / W::kElements, tokens, lanes, some_lanes, depth, sums + c * tokens, first,
                               ahead);
      }
    }
  }
  if (first) __builtin_memset(sums, 0, static_cast<size_t>(tokens * width) * sizeof(float));
  for (int64_t t = 0; t < tokens; ++t) {
    T* const out = static_cast<T*>(p.dx) + (token + t) * p.w.k + column;
    for (int64_t c = 0; c < columns; c += kGroup) {
      F v[4];
      load_sums(sums, tokens, t, c, width, v);
      decoded_to_memory_order(v);
      for (int q = 0; q < 4; ++q) store_some(out + c + q * kLanes, v[q], columns - c - q * kLanes);
    }
  }
}

template <class W, class T>
void linear_dx(const Pool& pool, const LinearDxProblem& p) {
  // By the whole problem, not by the task, since the order of the sums depends on it.
  const DxShape& shape = p.m <= kFewTokens ? kFewTokensShape : kManyTokensShape;
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
        backward_block<W, T>(p, shape, g, first, first + token, at_most(grid.tokens.size, tokens - token), column,
                             at_most(grid.rows.size, p.w.k - column));
      }
    };
    pool(grid.tasks(), 1, body);
  }
}
