// Calls whose tokens use different adapters (cpp/format/problem.h, Adapters). The product with W is that of any call.
// Only low-rank products go adapter by adapter: h and g here, and their parts of y and dx in the tasks, which find the
// tokens of each adapter by for_each_adapter.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/grid.h"
#include "cpp/cpu/many_tokens/low_rank-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/cpu/shared/work_stealing-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

// Calls f(lora, list, count) for each adapter that a task's tokens use, and for none (rank 0). `list` has the tokens of
// the task in ascending order. Token t of the task is token place(t) of the call.
template <class Place, class F>
void for_each_adapter(const Adapters& adapters, int64_t tokens, const Place& place, const F& f) {
  int32_t list[kMostTokens];
  bool listed[kMostTokens] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    if (listed[t]) continue;
    const int32_t adapter = adapters.of_token[place(t)];
    int64_t count = 0;
    for (int64_t i = t; i < tokens; ++i) {
      if (adapters.of_token[place(i)] != adapter) continue;
      list[count++] = static_cast<int32_t>(i);
      listed[i] = true;
    }
    f(adapter < 0 ? Lora{} : adapters.each[adapter], static_cast<const int32_t*>(list), count);
  }
}

// Copies ranks [rank, rank + ranks) of the listed rows of h or g, whose rows are `width` long, to out [count, ranks].
template <class T>
void copy_low_rank(const T* low, int64_t width, const int32_t* list, int64_t count, int64_t rank, int64_t ranks,
                   T* out) {
  for (int64_t i = 0; i < count; ++i)
    __builtin_memcpy(out + i * ranks, low + list[i] * width + rank, static_cast<size_t>(ranks) * sizeof(T));
}

template <Factor layout, class T>
Matrix<T> factor_of(const Lora& lora, int64_t features) {
  if constexpr (layout == Factor::kRankByFeature) return {static_cast<const T*>(lora.a), features};
  return {static_cast<const T*>(lora.b), lora.b_row(1)};
}

// h or g of tokens [first, first + tokens) of a call: out [tokens, lora.rank]. `in` is x or dy. Only x is dropped.
template <class W, Factor layout, class T>
void low_rank_of_call(const Pool& pool, Matrix<T> in, const Lora& lora, int64_t first, int64_t tokens, int64_t features,
                      T* out) {
  const auto dropout_of = [](const Lora& l) { return layout == Factor::kRankByFeature ? l.dropout : Dropout{}; };
  if (!lora.adapters) {
    in.dropout = dropout_of(lora);
    return low_rank<W, layout>(pool, in, first, tokens, features, factor_of<layout, T>(lora, features), 0, lora.rank,
                               lora.scaling, LowRankOut<T>{out, lora.rank, 1});
  }
  // The tokens by adapter, and the number of the first task of each. A task has tokens of one adapter.
  const Adapters& adapters = *lora.adapters;
  const int64_t count = adapters.count, words = 2 * (count + 1) + tokens;
  int64_t* const begins =
      static_cast<int64_t*>(scratch(ScratchUse::kTokens, words * static_cast<int64_t>(sizeof(int64_t))));
  int64_t *const tasks = begins + count + 1, *const rows = tasks + count + 1;
  __builtin_memset(begins, 0, static_cast<size_t>(words) * sizeof(int64_t));
  const int32_t* const of_token = adapters.of_token + first;
  for (int64_t t = 0; t < tokens; ++t)
    if (of_token[t] >= 0) ++begins[of_token[t] + 1];
  for (int64_t e = 0; e < count; ++e) tasks[e] = begins[e], begins[e + 1] += begins[e];
  for (int64_t t = 0; t < tokens; ++t)
    if (of_token[t] >= 0) rows[tasks[of_token[t]]++] = first + t;
  const int64_t size = max(min(tokens_per_low_rank_task(lora.rank), ceil_div(tokens, pool.threads)), 1);
  tasks[0] = 0;
  for (int64_t e = 0; e < count; ++e)
    tasks[e + 1] = tasks[e] + (adapters.each[e].rank ? ceil_div(begins[e + 1] - begins[e], size) : 0);
  run_tasks(pool, tasks[count], [&](int64_t i) {
    int64_t e = 0;
    while (tasks[e + 1] <= i) ++e;
    const Lora& one = adapters.each[e];
    const int64_t begin = begins[e] + (i - tasks[e]) * size;
    Matrix<T> of_task = in;
    of_task.dropout = dropout_of(one);
    of_task.rows = rows + begin;
    low_rank_task<W, layout>(of_task, features, factor_of<layout, T>(one, features), 0, one.rank,
                             one.scaling * of_task.dropout.keep_scale, 0, 0, min(size, begins[e + 1] - begin),
                             LowRankOut<T>{out, lora.rank, 1, rows + begin, first});
  });
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
