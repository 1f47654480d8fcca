// The low-rank products over features, h = round(factor · dropout(x) · Aᵀ) and g = round(factor · dy · B). Included
// inside the kernels' anonymous namespace.
//
// Tokens are the broadcast rows and the rank the lanes: x and dy are read as they lie in memory, and only the small
// factor is ever rearranged.
#pragma once

#include "cpp/cpu/many_tokens/tasks-inl.h"

enum class Factor { kRankByFeature, kFeatureByRank };  // A [r, k], B [n, r]

// Where it goes: the i-th of the tokens and j-th of the ranks asked for to out[i * token_stride + j * rank_stride].
template <class T>
struct Projected {
  T* out;
  int64_t token_stride, rank_stride;
};

template <class W, Factor layout, class T>
void project_block(const Matrix<T>& in, int64_t features, const Matrix<T>& factor, int64_t first_rank, int64_t rank,
                   double scale, int64_t first_token, int64_t token, int64_t tokens, const Projected<T>& to) {
  using Word = typename W::Word;
  Arena arena;
  Word* const rows = arena.take<Word>(tokens * kDepth);
  Word* const lanes = arena.take<Word>(kTileLanes * kDepth);
  float* const block = arena.take<float>(tokens * kTileLanes);
  float* const sums = arena.take<float>(tokens * round_up(rank, kTileLanes));
  if (features == 0)
    __builtin_memset(sums, 0, static_cast<size_t>(tokens * round_up(rank, kTileLanes)) * sizeof(float));
  const Cut blocks = cut(features, kDepth * W::kElements, kGroup);
  for (int64_t f = 0; f < features; f += blocks.size) {
    const int64_t columns = at_most(blocks.size, features - f);
    load_rows<W>(in, first_token + token, tokens, f, columns, rows);
    for (int64_t r = 0; r < rank; r += kTileLanes) {
      const int64_t ranks = at_most(rank - r, kTileLanes);
      int depth = static_cast<int>(ceil_div(columns, W::kElements));
      if constexpr (layout == Factor::kRankByFeature) {
        depth = transpose_lanes<W, Order::kMemory>(factor, first_rank + r, ranks, f, columns, lanes);
      } else {
        load_lanes<W, Order::kMemory>(factor, f, columns, first_rank + r, ranks, ranks, lanes);
      }
      Ahead nothing;
      multiply<W, kLowRankChain<T>>(rows, tokens, lanes, ranks, depth, block, true, nothing);
      add_block(block, tokens * tile_width(ranks), sums + r * tokens, f == 0);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rank; ++r) {
      const int64_t tile = r / kTileLanes * kTileLanes, width = tile_width(rank - tile);
      from_float(static_cast<float>(sums[tile * tokens + t * width + r - tile] * scale),
                 &to.out[(token + t) * to.token_stride + r * to.rank_stride]);
    }
  }
}

template <class W, Factor layout, class T>
void project(const Pool& pool, const Matrix<T>& in, int64_t first_token, int64_t tokens, int64_t features,
             const Matrix<T>& factor, int64_t first_rank, int64_t rank, double scaling, const Projected<T>& to) {
  constexpr int64_t kMostTokens = 128, kMostSums = 128 << 10;
  const int64_t most = at_least(at_most(kMostTokens, kMostSums / round_up(rank, kTileLanes)), 1);
  const int64_t blocks = at_least(ceil_div(tokens, most), at_most(pool.threads, ceil_div(tokens, 8)));
  const Cut c = cut_by_count(tokens, blocks, 1);
  const double scale = scaling * in.dropout.keep_scale;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t t = b * c.size;
      project_block<W, layout>(in, features, factor, first_rank, rank, scale, first_token, t,
                               at_most(c.size, tokens - t), to);
    }
  };
  pool(c.count, 1, body);
}
