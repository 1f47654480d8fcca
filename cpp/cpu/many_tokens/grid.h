// How the outputs of products are cut into tasks: pure functions, so that `_C.task_grid` answers for any processor and
// any number of threads.
#pragma once

#include <cstdint>

#include "cpp/format/packing.h"

namespace qlora::cpu {
namespace {  // every instruction set compiles a copy of its own

// `count` pieces that cover n. Each has `size` elements (the last may have fewer), a multiple of `unit`.
struct Cut {
  int64_t count, size;
};
constexpr Cut cut_by_count(int64_t n, int64_t count, int64_t unit) {
  const int64_t least = ceil_div(n, count > 1 ? count : 1);
  const int64_t size = least > 1 ? ceil_div(least, unit) * unit : unit;
  return {ceil_div(n, size), size};
}

// A side of the output. A task has at most `most` elements of it. `overhead` is what an element costs a task beside its
// multiplications, in multiply-adds per element of the summed dimension: a weight is decoded, and a dense operand is
// copied into a panel.
struct Side {
  int64_t size, most, unit, overhead;

  // A piece is a multiple of `unit`, and no larger than `most`.
  constexpr int64_t least_cuts() const { return size > most ? ceil_div(size, most - most % unit) : 1; }
  constexpr int64_t most_cuts() const { return size > unit ? ceil_div(size, unit) : 1; }
};
struct Sides {
  Side rows, tokens;  // rows of the weight (dx: columns)

  // What a task costs, in multiply-adds per element of the summed dimension.
  constexpr int64_t cost(int64_t rows_of_task, int64_t tokens_of_task) const {
    return rows_of_task * tokens_of_task + rows.overhead * rows_of_task + tokens.overhead * tokens_of_task;
  }
};

// A task takes a rectangle: some rows and some tokens.
struct Grid {
  Cut rows, tokens;

  constexpr int64_t tasks() const { return rows.count * tokens.count; }
};

// What all tasks cost together.
constexpr int64_t total_cost(const Sides& sides, const Grid& grid) {
  const int64_t rows = sides.rows.size, tokens = sides.tokens.size;
  return rows * tokens + sides.rows.overhead * rows * grid.tokens.count +
         sides.tokens.overhead * tokens * grid.rows.count;
}

// A bound of what the busiest thread computes, as a cost, where free threads take tasks. The second one is Graham's: no
// thread begins its last task after the time at which all threads could have finished everything else together.
constexpr int64_t critical_path(int64_t threads, const Sides& sides, const Grid& grid) {
  const int64_t rows = grid.rows.size < sides.rows.size ? grid.rows.size : sides.rows.size;
  const int64_t tokens = grid.tokens.size < sides.tokens.size ? grid.tokens.size : sides.tokens.size;
  const int64_t largest = sides.cost(rows, tokens);
  const int64_t of_equal_tasks = ceil_div(grid.tasks(), threads) * largest;
  const int64_t of_any_tasks = ceil_div(total_cost(sides, grid) + (threads - 1) * largest, threads);
  return of_equal_tasks < of_any_tasks ? of_equal_tasks : of_any_tasks;
}

// The grid with the shortest critical path. Among grids that are within 1% of it and decode no weight more often, the
// one with the most tasks, because those are taken by whichever thread is free. A thread gets at most `spare_rounds`
// tasks more than necessary.
constexpr Grid make_grid(int64_t threads, int64_t spare_rounds, const Sides& sides) {
  const auto& [rows, tokens] = sides;
  const int64_t least_rounds = ceil_div(rows.least_cuts() * tokens.least_cuts(), threads);
  const auto for_each_grid = [&](const auto& use) {
    for (int64_t rounds = least_rounds; rounds <= least_rounds + spare_rounds; ++rounds) {
      const int64_t tasks = rounds * threads;
      for (int64_t cuts = tokens.least_cuts(); cuts <= tokens.most_cuts() && cuts <= tasks; cuts += 1 + cuts / 8) {
        const int64_t row_cuts = tasks / cuts > rows.least_cuts() ? tasks / cuts : rows.least_cuts();
        use(Grid{cut_by_count(rows.size, row_cuts, rows.unit), cut_by_count(tokens.size, cuts, tokens.unit)});
      }
    }
  };
  Grid best{};
  int64_t shortest = INT64_MAX;
  for_each_grid([&](const Grid& grid) {
    const int64_t path = critical_path(threads, sides, grid);
    if (path < shortest) shortest = path, best = grid;
  });
  if (spare_rounds == 0 || threads == 1) return best;
  const int64_t limit = shortest + shortest / 100, most_token_cuts = best.tokens.count;
  for_each_grid([&](const Grid& grid) {
    if (grid.tokens.count <= most_token_cuts && grid.tasks() > best.tasks() &&
        critical_path(threads, sides, grid) <= limit)
      best = grid;
  });
  return best;
}

// ---- the products of many_tokens/ ----

inline constexpr int64_t kSpareRounds = 3;
inline constexpr int64_t kMostTokens = 256;                              // per task
inline constexpr int64_t kMostSums = 180 * 1024;                         // floats of a task of the forward
inline constexpr int64_t kDecodeCost = 6, kPackCost = 6, kCopyCost = 3;  // overheads of sides

// The vectors of an instruction set: lanes, and the vectors of sums that stay in registers.
struct VectorUnit {
  int64_t lanes, accumulators;

  constexpr int64_t tile_lanes() const { return 2 * lanes; }
};

constexpr Sides forward_sides(const VectorUnit& unit, int64_t n, int64_t tokens) {
  const int64_t tiles = ceil_div(tokens, unit.tile_lanes()) * unit.tile_lanes();
  const int64_t height = unit.accumulators / 2, most = tiles > kMostTokens ? kMostTokens : tiles > 0 ? tiles : 1;
  return {{n, kMostSums / most / height * height, height, kDecodeCost},
          {tokens, kMostTokens, unit.tile_lanes(), kPackCost}};
}

// Columns of dx per task, of a problem with m tokens. Few tokens use many columns of a decoded weight row.
inline constexpr int64_t kFewDxTokens = 64;
constexpr int64_t most_dx_columns(int64_t m) { return m <= kFewDxTokens ? 2048 : 512; }

inline constexpr int64_t kDxTokenUnit = 8;
// dx of `tokens` tokens of a problem with m, which are broadcast. Tasks have multiples of `column_unit` columns.
constexpr Sides dx_sides(int64_t k, int64_t column_unit, int64_t m, int64_t tokens) {
  return {{k, most_dx_columns(m), column_unit, kDecodeCost}, {tokens, kMostTokens, kDxTokenUnit, kCopyCost}};
}

constexpr int64_t dlora_tasks(int64_t columns, int64_t k, int64_t n) {
  return ceil_div(k, columns) + ceil_div(n, columns);
}
constexpr int64_t dlora_path(int64_t threads, int64_t columns, int64_t k, int64_t n) {
  return ceil_div(dlora_tasks(columns, k, n), threads) * (columns + kCopyCost);
}
// How many columns of x and dy a task of dlora takes: of the sizes with the shortest critical path, the largest.
constexpr int64_t dlora_columns(int64_t threads, const VectorUnit& unit, int64_t k, int64_t n) {
  constexpr int64_t kMost = 256, kLeast = 32;
  int64_t best = 0, shortest = INT64_MAX;
  for (int64_t columns = kMost; columns >= kLeast; columns -= unit.tile_lanes()) {
    const int64_t path = dlora_path(threads, columns, k, n);
    if (path < shortest) best = columns, shortest = path;
  }
  return best;
}

}  // namespace
}  // namespace qlora::cpu
