// Cuts a product into tasks, and has what tasks share: the size of their scratch, the order of their sums, and ways to
// store them.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/grid.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/work_stealing-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

inline Cut cut(int64_t n, int64_t most, int64_t unit) { return cut_by_count(n, ceil_div(n, most), unit); }

inline constexpr VectorUnit kVectorUnit{kLanes, kAccumulators};

// Runs run_task(token, tokens of the task, row, rows) for the rectangles of a grid that covers both sides.
template <class RunTask>
void run_grid(const Pool& pool, const Sides& sides, const RunTask& run_task) {
  const auto& [rows, tokens] = sides;
  const Grid grid = make_grid(pool.threads, kSpareRounds, sides);
  run_tasks(pool, grid.tasks(), [&](int64_t i) {
    const int64_t row = i % grid.rows.count * grid.rows.size, token = i / grid.rows.count * grid.tokens.size;
    run_task(token, min(grid.tokens.size, tokens.size - token), row, min(grid.rows.size, rows.size - row));
  });
}

inline constexpr int64_t kTaskBytes = int64_t{1408} << 10;  // of scratch per task

inline constexpr int64_t kCallBytes = int64_t{704} << 10;  // of scratch for h and g per call

// The number of tokens whose h or g, [tokens, rank], fits the scratch of a call.
template <class T>
inline int64_t shared_tokens(int64_t tokens, int64_t rank) {
  const int64_t fit = max(kCallBytes / (max(rank, 1) * static_cast<int64_t>(sizeof(T))), 1);
  return fit < tokens && fit > 2 * kTileLanes ? fit & -kTileLanes : min(fit, tokens);
}

// Low-rank products are summed in three levels: chains in registers, a few chains per slice, and the slices. 16-bit
// results need two levels. float32 results should be as accurate as a library's, which sums products of few rows in
// very short chains.
template <class T>
inline constexpr int kLowRankChain = sizeof(T) == 4 ? 8 : kDepth;
inline void add_slice(const float* slice, int64_t count, float* sums, bool first) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(sums + i, first ? load(slice + i) : add(load(sums + i), load(slice + i)));
}

// Multiplies by a double. Rounding the factor to float32 first would be an error that all results share.
class Scale {
 public:
  explicit Scale(double s)
      : high_(splat(static_cast<float>(s))), low_(splat(static_cast<float>(s - static_cast<float>(s)))) {}
  F operator()(F v) const { return multiply_add(v, high_, mul(v, low_)); }

 private:
  F high_, low_;
};

// Stores the sums of one tile of lanes, [height][width] (multiply-inl.h), to a row-major matrix `out` [lanes, height],
// lane by lane, and adds the bias of its row to each sum. If there are `places`, lane l goes to row places[l].
template <class T>
void store_transposed(const float* sums, int64_t height, int64_t width, int64_t lanes, const T* bias, T* out,
                      int64_t stride, const int64_t* places = nullptr) {
  for (int64_t l = 0; l < lanes; l += kLanes) {
    for (int64_t r = 0; r < height; r += kLanes) {
      F v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (r + i < height) {
          v[i] = load(sums + (r + i) * width + l);
          if (bias) v[i] = add(v[i], splat(to_float(bias[r + i])));
        } else {
          v[i] = zero();
        }
      }
      transpose(v);
      for (int i = 0; i < kLanes && l + i < lanes; ++i)
        store_some(out + (places ? places[l + i] : l + i) * stride + r, v[i], height - r);
    }
  }
}

// The vectors of lanes [lane, lane + kGroup) in row `row` of sums [tile][height][width] (multiply-inl.h). Lanes from
// `lanes` on are zeros.
inline void load_sums(const float* sums, int64_t height, int64_t row, int64_t lane, int64_t lanes, F (&v)[4]) {
  for (int q = 0; q < 4; q += 2, lane += kTileLanes) {
    v[q] = v[q + 1] = zero();
    if (lane >= lanes) continue;
    const int64_t width = tile_width(lanes - lane);
    const float* in = sums + lane * height + row * width;
    v[q] = load(in);
    if (width == kTileLanes) v[q + 1] = load(in + kLanes);
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
