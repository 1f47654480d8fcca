// The products of a dense weight of 16 bits with tokens in float32, y = x · wᵀ + bias and dx = dy · w: output heads,
// and other layers that stay dense, in a run that computes in float32.
//
// As with a packed weight, each task owns a rectangle of the output, and converts a piece of the weight to float32 in a
// panel, instead of decoding it. Both operands keep the order of memory. A few tokens take one pass over the weight,
// whose rows are converted in registers.
//
// The order of an element's sum depends on the problem's sizes, not on the tasks, so the result does not depend on the
// number of threads.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens/word_f32-inl.h"
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

template <class T>
Matrix<T> matrix(const DenseWeight& w) {
  return {static_cast<const T*>(w.data), w.k};
}

// Prefetches the lines of a piece of the weight, one per step of a multiplication.
inline WeightLinePrefetcher prefetch_piece(const DenseWeight& w, int64_t row, int64_t rows, int64_t column,
                                           int64_t columns) {
  constexpr int64_t kUnits = 4;  // a prefetcher counts in weights of 4 bits
  return {static_cast<const uint8_t*>(w.data), kUnits * (row * w.k + column), rows, kUnits * w.k, kUnits * columns};
}

// ---- a few tokens ----

// Tokens for which one pass over the weight takes less time than panels.
inline constexpr int64_t kMostPassTokens = 4;

// The sums of kRows rows of w for one token: vectors of partial sums, which are yet to be added.
template <int kRows, class T>
inline void multiply_rows(const T* w, int64_t k, const float* x, F (&sums)[kRows]) {
  constexpr int64_t kChainElements = kChain<float> * kLanes;
  unroll<kRows>([&](auto r) { sums[r.value] = zero(); });
  for (int64_t begin = 0; begin < k; begin += kChainElements) {
    const int64_t end = min(k, begin + kChainElements);
    F chain[kRows];
    unroll<kRows>([&](auto r) { chain[r.value] = zero(); });
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) {
      const F v = load(x + c);
      unroll<kRows>([&](auto r) { chain[r.value] = multiply_add(load(w + r.value * k + c), v, chain[r.value]); });
    }
    if (c < end) {
      const F v = load_some(x + c, end - c);
      unroll<kRows>(
          [&](auto r) { chain[r.value] = multiply_add(load_some(w + r.value * k + c, end - c), v, chain[r.value]); });
    }
    unroll<kRows>([&](auto r) { sums[r.value] = add(sums[r.value], chain[r.value]); });
  }
}

// y of all tokens for weight rows [row, row + rows), at most kLanes rows.
template <class T>
void pass_over_rows(const DenseLinearProblem& p, int64_t row, int64_t rows) {
  constexpr int kTogether = 4;
  const Matrix<T> w = matrix<T>(p.w);
  for (int64_t t = 0; t < p.m; ++t) {
    const float* const x = p.x + t * p.w.k;
    F v[kLanes];
    for (int i = 0; i < kLanes; i += kTogether) {
      F some[kTogether] = {zero(), zero(), zero(), zero()};
      if (i + kTogether <= rows) {
        multiply_rows(w.at(row + i, 0), p.w.k, x, some);
      } else {
        for (int r = 0; i + r < rows; ++r) {
          F one[1];
          multiply_rows(w.at(row + i + r, 0), p.w.k, x, one);
          some[r] = one[0];
        }
      }
      unroll<kTogether>([&](auto r) { v[i + r.value] = some[r.value]; });
    }
    transpose(v);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) v[i] = add(v[i], v[i + width]);
    if (p.bias) v[0] = add(v[0], load_some(p.bias + row, rows));
    store_some(p.y + t * p.w.n + row, v[0], rows);
  }
}

template <class T>
void pass_over_weight(const Pool& pool, const DenseLinearProblem& p) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kLanes; row < min(end * kLanes, p.w.n); row += kLanes)
      pass_over_rows<T>(p, row, min(kLanes, p.w.n - row));
  };
  pool(ceil_div(p.w.n, kLanes), 8, body);
}

// ---- many tokens ----

// Rows of a broadcast panel that are multiplied by all lanes while they are in the first-level cache.
inline constexpr int64_t kStripRows = 24;

// The steps that are summed in registers. docs/security.md's bound for float32 allows for as many.
inline constexpr int kDenseChain = 64;

// The forward: weight rows are broadcast, tokens are the lanes.
template <class T>
class DenseForwardTask {
 public:
  static constexpr int64_t kMostLaneWords = 64 * 1024;
  static_assert(4 * (kStripRows * kDepth + kMostLaneWords + kMostSums) <= kTaskBytes);

  // y of tokens [token, token + tokens) and weight rows [row, row + rows).
  DenseForwardTask(const DenseLinearProblem& p, int64_t token, int64_t tokens, int64_t row, int64_t rows)
      : p_(p), token_(token), tokens_(tokens), row_(row), rows_(rows) {
    Carver memory(scratch(ScratchUse::kThread, kTaskBytes));
    strip_ = memory.take<float>(kStripRows * kDepth);
    lanes_ = memory.take<float>(kMostLaneWords);
    sums_ = memory.take<float>(rows * round_up(tokens, kLanes));
  }

  void operator()() {
    if (p_.w.k == 0) {
      __builtin_memset(sums_, 0, static_cast<size_t>(rows_ * round_up(tokens_, kLanes)) * sizeof(float));
    }
    const int64_t columns = max(kMostLaneWords / round_up(tokens_, kLanes) / pieces_.size, 1) * pieces_.size;
    for (int64_t c = 0; c < p_.w.k; c += columns) add_columns(c, min(columns, p_.w.k - c));
    for (int64_t t = 0; t < tokens_; t += kTileLanes) {
      const int64_t some = min(tokens_ - t, kTileLanes);
      store_transposed(sums_ + t * rows_, rows_, tile_width(some), some, p_.bias ? p_.bias + row_ : nullptr,
                       p_.y + (token_ + t) * p_.w.n + row_, p_.w.n);
    }
  }

 private:
  void add_columns(int64_t column, int64_t columns) {
    const Matrix<float> x{p_.x, p_.w.k};
    const int depth = transpose_lanes<WordF32, Order::kMemory>(x, token_, tokens_, column, columns, lanes_);
    for (int64_t r = 0; r < rows_; r += strips_.size) {
      const int64_t rows = min(strips_.size, rows_ - r);
      for (int64_t c = 0; c < columns; c += pieces_.size) {
        const int64_t some = min(pieces_.size, columns - c);
        load_broadcast<WordF32>(matrix<T>(p_.w), row_ + r, rows, column + c, some, strip_);
        const bool ends_strip = c + some == columns;
        const int64_t next = ends_strip ? r + rows : r, next_column = ends_strip ? 0 : c + some;
        WeightLinePrefetcher prefetch = prefetch_piece(p_.w, row_ + next, min(strips_.size, rows_ - next),
                                                       column + next_column, min(pieces_.size, columns - next_column));
        for (int64_t l = 0; l < tokens_; l += kTileLanes) {
          const int64_t lanes = min(tokens_ - l, kTileLanes), width = tile_width(lanes);
          multiply<WordF32, kDenseChain>(strip_, rows, lanes_ + l * depth + c * width, lanes, static_cast<int>(some),
                                         sums_ + l * rows_ + r * width, column + c == 0, prefetch);
        }
      }
    }
  }

  const DenseLinearProblem& p_;
  const int64_t token_, tokens_, row_, rows_;
  const Cut strips_ = cut(rows_, kStripRows, 1), pieces_ = cut(p_.w.k, kDepth, kLanes);
  float *strip_, *lanes_, *sums_;
};

// dX: tokens are broadcast, columns are the lanes.
template <class T>
class DenseDxTask {
 public:
  static constexpr int64_t kMostColumns = 1024, kPieceColumns = 64;
  static_assert(4 * (kMostTokens * kDepth + kPieceColumns * kDepth + kMostTokens * kMostColumns) <= kTaskBytes);

  // dx of tokens [token, token + tokens) and columns [column, column + columns).
  DenseDxTask(const DenseLinearDxProblem& p, int64_t token, int64_t tokens, int64_t column, int64_t columns)
      : p_(p), token_(token), tokens_(tokens), column_(column), columns_(columns) {
    Carver memory(scratch(ScratchUse::kThread, kTaskBytes));
    broadcast_ = memory.take<float>(tokens * kDepth);
    lanes_ = memory.take<float>(kPieceColumns * kDepth);
    sums_ = memory.take<float>(tokens * round_up(columns, kGroup));
  }

  void operator()() {
    if (p_.w.n == 0) {
      __builtin_memset(sums_, 0, static_cast<size_t>(tokens_ * round_up(columns_, kGroup)) * sizeof(float));
    }
    const Matrix<float> dy{p_.dy, p_.w.n};
    const Cut slices = cut(p_.w.n, kDepth, 1);
    for (int64_t r = 0; r < p_.w.n; r += slices.size) {
      const int64_t rows = min(slices.size, p_.w.n - r);
      load_broadcast<WordF32>(dy, token_, tokens_, r, rows, broadcast_);
      for (int64_t c = 0; c < columns_; c += kPieceColumns) {
        const int64_t some = min(kPieceColumns, columns_ - c);
        load_lanes<WordF32, Order::kMemory>(matrix<T>(p_.w), r, rows, column_ + c, some, some, lanes_);
        const bool ends_slice = c + some == columns_;
        const int64_t next = ends_slice ? r + rows : r, next_column = ends_slice ? 0 : c + some;
        WeightLinePrefetcher prefetch =
            prefetch_piece(p_.w, next, min(slices.size, p_.w.n - next), column_ + next_column,
                           min(kPieceColumns, columns_ - next_column));
        for (int64_t t = 0; t < tokens_; t += strips_.size) multiply_strip(t, c, some, rows, r == 0, prefetch);
      }
    }
    for (int64_t t = 0; t < tokens_; ++t) {
      float* const out = p_.dx + (token_ + t) * p_.w.k + column_;
      for (int64_t c = 0; c < columns_; c += kGroup) {
        F v[4];
        load_sums(sums_, tokens_, t, c, columns_, v);
        for (int q = 0; q < 4; ++q) store_some(out + c + q * kLanes, v[q], columns_ - c - q * kLanes);
      }
    }
  }

 private:
  // Multiplies the strip of tokens that begins with `token` by the panel's `columns` columns, over `rows` weight rows.
  void multiply_strip(int64_t token, int64_t column, int64_t columns, int64_t rows, bool first,
                      WeightLinePrefetcher& prefetch) {
    const int64_t height = min(strips_.size, tokens_ - token);
    for (int64_t l = 0; l < columns; l += kTileLanes) {
      const int64_t lanes = min(columns - l, kTileLanes);
      multiply<WordF32, kDenseChain>(broadcast_ + token * kDepth, height, lanes_ + l * rows, lanes,
                                     static_cast<int>(rows), sums_ + (column + l) * tokens_ + token * tile_width(lanes),
                                     first, prefetch);
    }
  }

  const DenseLinearDxProblem& p_;
  const int64_t token_, tokens_, column_, columns_;
  const Cut strips_ = cut(tokens_, kStripRows, 1);
  float *broadcast_, *lanes_, *sums_;
};

// Runs Task(p, token, tokens, first, size) for each task of the grid.
template <class Task, class Problem>
void run_dense_tasks(const Pool& pool, const Problem& p, const Side& outputs) {
  run_grid(pool, {outputs, {p.m, kMostTokens, kTileLanes, kPackCost}},
           [&](int64_t token, int64_t tokens, int64_t first, int64_t size) { Task(p, token, tokens, first, size)(); });
}

// ---- the operators ----

template <class Use>
void with_weight_type(const DenseWeight& w, const Use& use) {
  if (w.dtype == DType::kBFloat16) {
    use.template operator()<bfloat16>();
  } else {
    use.template operator()<float16>();
  }
}

inline void linear_dense(const Pool& pool, const DenseLinearProblem& p) {
  with_weight_type(p.w, [&]<class T>() {
    if (p.m <= kMostPassTokens) return pass_over_weight<T>(pool, p);
    using Task = DenseForwardTask<T>;
    Side rows = forward_sides(kVectorUnit, p.w.n, p.m).rows;
    rows.overhead = kCopyCost;
    run_dense_tasks<Task>(pool, p, rows);
  });
}

inline void linear_dense_dx(const Pool& pool, const DenseLinearDxProblem& p) {
  with_weight_type(p.w, [&]<class T>() {
    using Task = DenseDxTask<T>;
    run_dense_tasks<Task>(pool, p, {p.w.k, Task::kMostColumns, kGroup, kCopyCost});
  });
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
