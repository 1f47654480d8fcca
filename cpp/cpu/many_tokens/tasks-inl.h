// Cuts a product into tasks, and has what tasks share: the size of their scratch, the order of their sums, and ways to
// store them.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/dense-inl.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

// `count` pieces that cover n. Each has `size` elements (the last may have fewer): at most `most`, and a multiple of
// `unit`.
struct Cut {
  int64_t count, size;
};
inline Cut cut_by_count(int64_t n, int64_t count, int64_t unit) {
  const int64_t size = max(round_up(ceil_div(n, max(count, 1)), unit), unit);
  return {ceil_div(n, size), size};
}
inline Cut cut(int64_t n, int64_t most, int64_t unit) { return cut_by_count(n, ceil_div(n, most), unit); }

// How the output of a product is divided among tasks. A task takes a rectangle: some rows of the weight (dx: columns)
// and some tokens. Cuts along the weight are preferred, because every cut along the tokens decodes the same weights
// again, but there must be work for all threads.
struct Grid {
  Cut rows, tokens;
  int64_t tasks() const { return rows.count * tokens.count; }
};
inline Grid make_grid(int threads, int64_t rows, int64_t most_rows, int64_t unit, int64_t tokens, int64_t most_tokens) {
  constexpr int64_t kWorthwhileRows = 48, kWorthwhileTokens = kTileLanes;
  int64_t row_cuts = round_up(ceil_div(rows, most_rows), threads);
  if (rows < row_cuts * kWorthwhileRows) row_cuts = max(ceil_div(rows, most_rows), rows / kWorthwhileRows);
  row_cuts = max(row_cuts, 1);
  int64_t token_cuts = ceil_div(tokens, most_tokens);
  if (row_cuts * token_cuts < threads)
    token_cuts = min(ceil_div(threads, row_cuts), ceil_div(tokens, kWorthwhileTokens));
  return {cut_by_count(rows, row_cuts, unit), cut_by_count(tokens, token_cuts, kTileLanes)};
}

inline constexpr int64_t kTaskBytes = int64_t{1408} << 10;  // of scratch per task

inline constexpr int64_t kMostTokens = 256;                // per task
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
