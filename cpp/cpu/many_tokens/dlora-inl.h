// The gradients of the low-rank factors, dA = gᵀ · dropout(x) and dB = dyᵀ · h.
//
// Both sum over tokens. The ranks are broadcast, from g and h in the layout [rank, tokens]. The features are the lanes,
// from x and dy in memory order. g and h are copied into that layout, or computed if they are not given. This is done
// for as many ranks at a time as the scratch of a call holds for all tokens, and at least one.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/low_rank-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/work_stealing-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

// Columns [column, column + columns) of low [rank, m] · in [m, features]. `store_sums` gets the sums in the layout of
// multiply-inl.h.
template <class W, class T, class Store>
void reduce_tokens(const Matrix<T>& low, int64_t rank, const Matrix<T>& in, int64_t m, int64_t column, int64_t columns,
                   const Store& store_sums) {
  using Word = typename W::Word;
  Carver memory(scratch(ScratchUse::kThread, kTaskBytes));
  Word* const broadcast = memory.take<Word>(rank * kDepth);
  Word* const lanes = memory.take<Word>(round_up(columns, kLanes) * kDepth);
  const int64_t count = rank * round_up(columns, kLanes);
  float* const slice = memory.take<float>(count);
  float* const sums = memory.take<float>(count);
  if (m == 0) __builtin_memset(sums, 0, static_cast<size_t>(count) * sizeof(float));
  const Cut slices = cut(m, kDepth * W::kElements, W::kElements);
  for (int64_t t = 0; t < m; t += slices.size) {
    const int64_t tokens = min(slices.size, m - t);
    load_broadcast<W>(low, 0, rank, t, tokens, broadcast);
    load_lanes<W, Order::kMemory>(in, t, tokens, column, columns, columns, lanes);
    const int depth = static_cast<int>(ceil_div(tokens, W::kElements));
    WeightLinePrefetcher nothing;
    multiply<W, kLowRankChain<T>>(broadcast, rank, lanes, columns, depth, slice, true, nothing);
    add_slice(slice, count, sums, t == 0);
  }
  store_sums(sums);
}

// Copies ranks [first, first + ranks) of a given h or g [m, r] to out [ranks, m].
template <class T>
void copy_ranks(const Pool& pool, const T* given, int64_t m, int64_t r, int64_t first, int64_t ranks, T* out) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t q = 0; q < ranks; ++q)
      for (int64_t t = begin; t < end; ++t) out[q * m + t] = given[t * r + first + q];
  };
  pool(m, 1024, body);
}

template <class W, class T>
void dlora(const Pool& pool, const LoraGradProblem& p) {
  constexpr int64_t kMostRanks = 256;
  const int64_t r = p.lora.rank, m = p.m;
  const Matrix<T> x{static_cast<const T*>(p.x), p.k, p.lora.dropout}, dy{static_cast<const T*>(p.dy), p.n};
  const Matrix<T> a{static_cast<const T*>(p.lora.a), p.k}, b{static_cast<const T*>(p.lora.b), r};
  const int64_t fit = kCallBytes / static_cast<int64_t>(2 * sizeof(T)) / max(m, 1);
  const int64_t some = max(min(min(fit, kMostRanks), r), 1);
  const int64_t most_columns = dlora_columns(pool.threads, kVectorUnit, p.k, p.n);
  const Cut ks = cut(p.k, most_columns, kLanes), ns = cut(p.n, most_columns, kLanes);
  T* const h = static_cast<T*>(scratch(ScratchUse::kCall, 2 * m * some * static_cast<int64_t>(sizeof(T))));
  const Scale keep_scale(p.lora.dropout.keep_scale);
  for (int64_t first = 0; first < r; first += some) {
    const int64_t ranks = min(some, r - first);
    T* const g = h + m * ranks;
    if (p.h) {
      copy_ranks(pool, static_cast<const T*>(p.h), m, r, first, ranks, h);
    } else {
      low_rank<W, Factor::kRankByFeature>(pool, x, 0, m, p.k, a, first, ranks, p.lora.scaling, LowRankOut<T>{h, 1, m});
    }
    if (p.g) {
      copy_ranks(pool, static_cast<const T*>(p.g), m, r, first, ranks, g);
    } else {
      low_rank<W, Factor::kFeatureByRank>(pool, dy, 0, m, p.n, b, first, ranks, p.lora.scaling, LowRankOut<T>{g, 1, m});
    }
    run_tasks(pool, ks.count + ns.count, [&](int64_t i) {
      if (i < ks.count) {
        const int64_t column = i * ks.size, columns = min(ks.size, p.k - column);
        reduce_tokens<W>(Matrix<T>{g, m}, ranks, x, m, column, columns, [&](const float* sums) {
          for (int64_t q = 0; q < ranks; ++q) {
            T* const out = static_cast<T*>(p.da) + (first + q) * p.k + column;
            for (int64_t c = 0; c < columns; c += kGroup) {
              F v[4];
              load_sums(sums, ranks, q, c, columns, v);
              for (int s = 0; s < 4; ++s) store_some(out + c + s * kLanes, keep_scale(v[s]), columns - c - s * kLanes);
            }
          }
        });
      } else {
        const int64_t row = (i - ks.count) * ns.size, rows = min(ns.size, p.n - row);
        reduce_tokens<W>(Matrix<T>{h, m}, ranks, dy, m, row, rows, [&](const float* sums) {
          for (int64_t l = 0; l < rows; l += kTileLanes) {
            const int64_t lanes = min(rows - l, kTileLanes);
            store_transposed<T>(sums + l * ranks, ranks, tile_width(lanes), lanes, nullptr,
                                static_cast<T*>(p.db) + (row + l) * r + first, r);
          }
        });
      }
    });
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
