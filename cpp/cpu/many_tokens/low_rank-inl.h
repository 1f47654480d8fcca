// The low-rank intermediates, h = round(scaling · dropout(x) · Aᵀ) and g = round(scaling · dy · B).
//
// Tokens are broadcast and the ranks are the lanes, so x and dy are read in memory order, and only the small factor is
// rearranged.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/work_stealing-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

enum class Factor { kRankByFeature, kFeatureByRank };  // A [r, k], B [n, r]

// The output, h or g: token i and rank j, counted from the first requested ones, go to
// out[i * token_stride + j * rank_stride]. If there are `rows`, token i goes to rows[i] - first_row instead.
template <class T>
struct LowRankOut {
  T* out;
  int64_t token_stride, rank_stride;
  const int64_t* rows = nullptr;
  int64_t first_row = 0;

  T* of_token(int64_t i) const { return out + (rows ? rows[i] - first_row : i) * token_stride; }
};

template <class W, Factor layout, class T>
void low_rank_task(const Matrix<T>& in, int64_t features, const Matrix<T>& factor, int64_t first_rank, int64_t rank,
                   double scale, int64_t first_token, int64_t token, int64_t tokens, const LowRankOut<T>& to) {
  using Word = typename W::Word;
  [[maybe_unused]] const WordSession<W> session{};
  Carver memory(scratch(ScratchUse::kThread, kTaskBytes));
  Word* const broadcast = memory.take<Word>(tokens * kDepth);
  Word* const lanes = memory.take<Word>(kTileLanes * kDepth);
  float* const slice = memory.take<float>(tokens * kTileLanes);
  float* const sums = memory.take<float>(tokens * round_up(rank, kTileLanes));
  if (features == 0)
    __builtin_memset(sums, 0, static_cast<size_t>(tokens * round_up(rank, kTileLanes)) * sizeof(float));
  const Cut slices = cut(features, kDepth * W::kElements, kGroup);
  for (int64_t f = 0; f < features; f += slices.size) {
    const int64_t columns = min(slices.size, features - f);
    load_broadcast<W>(in, first_token + token, tokens, f, columns, broadcast);
    for (int64_t r = 0; r < rank; r += kTileLanes) {
      const int64_t ranks = min(rank - r, kTileLanes);
      int depth = static_cast<int>(ceil_div(columns, W::kElements));
      if constexpr (layout == Factor::kRankByFeature) {
        depth = transpose_lanes<W, Order::kMemory>(factor, first_rank + r, ranks, f, columns, lanes);
      } else {
        load_lanes<W, Order::kMemory>(factor, f, columns, first_rank + r, ranks, ranks, lanes);
      }
      WeightLinePrefetcher nothing;
      multiply<W, kLowRankChain<T>>(broadcast, tokens, lanes, ranks, depth, slice, true, nothing);
      add_slice(slice, tokens * tile_width(ranks), sums + r * tokens, f == 0);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rank; ++r) {
      const int64_t tile = r / kTileLanes * kTileLanes, width = tile_width(rank - tile);
      from_float(static_cast<float>(sums[tile * tokens + t * width + r - tile] * scale),
                 &to.of_token(token + t)[r * to.rank_stride]);
    }
  }
}

inline int64_t tokens_per_low_rank_task(int64_t rank) {
  constexpr int64_t kMost = 128, kMostLowRankSums = 128 << 10;
  return max(min(kMost, kMostLowRankSums / round_up(rank, kTileLanes)), 1);
}

template <class W, Factor layout, class T>
void low_rank(const Pool& pool, const Matrix<T>& in, int64_t first_token, int64_t tokens, int64_t features,
              const Matrix<T>& factor, int64_t first_rank, int64_t rank, double scaling, const LowRankOut<T>& to) {
  const int64_t tasks = max(ceil_div(tokens, tokens_per_low_rank_task(rank)), min(pool.threads, ceil_div(tokens, 8)));
  const Cut c = cut_by_count(tokens, tasks > pool.threads ? round_up(tasks, pool.threads) : tasks, 1);
  const double scale = scaling * in.dropout.keep_scale;
  run_tasks(pool, c.count, [&](int64_t i) {
    const int64_t t = i * c.size;
    low_rank_task<W, layout>(in, features, factor, first_rank, rank, scale, first_token, t, min(c.size, tokens - t),
                             to);
  });
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
