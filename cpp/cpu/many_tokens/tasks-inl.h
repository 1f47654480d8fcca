// How a product is cut into blocks, and the scratch they are computed in. Included inside the kernels' anonymous
// namespace.
#pragma once

#include "cpp/cpu/many_tokens/dense-inl.h"

// `count` pieces of `size` (the last may be shorter) that cover n: of at most `most`, nearly equal, multiples of
// `unit`.
struct Cut {
  int64_t count, size;
};
inline Cut cut_by_count(int64_t n, int64_t count, int64_t unit) {
  const int64_t size = at_least(round_up(ceil_div(n, at_least(count, 1)), unit), unit);
  return {ceil_div(n, size), size};
}
inline Cut cut(int64_t n, int64_t most, int64_t unit) { return cut_by_count(n, ceil_div(n, most), unit); }

// The output of a product in blocks, one a task. Blocks along `rows` (the weight's dimension) are preferred, since
// every block along `tokens` decodes its weights again, but there must be work for all threads.
struct Grid {
  Cut rows, tokens;
  int64_t tasks() const { return rows.count * tokens.count; }
};
inline Grid make_grid(int threads, int64_t rows, int64_t most_rows, int64_t unit, int64_t tokens, int64_t most_tokens) {
  constexpr int64_t kWorthwhileRows = 48, kWorthwhileTokens = kTileLanes;
  int64_t row_blocks = round_up(ceil_div(rows, most_rows), threads);
  if (rows < row_blocks * kWorthwhileRows) row_blocks = at_least(ceil_div(rows, most_rows), rows / kWorthwhileRows);
  row_blocks = at_least(row_blocks, 1);
  int64_t token_blocks = ceil_div(tokens, most_tokens);
  if (row_blocks * token_blocks < threads)
    token_blocks = at_most(ceil_div(threads, row_blocks), ceil_div(tokens, kWorthwhileTokens));
  return {cut_by_count(rows, row_blocks, unit), cut_by_count(tokens, token_blocks, kTileLanes)};
}

// Consecutive, line-aligned pieces of the calling thread's scratch, kTaskBytes together.
inline constexpr int64_t kTaskBytes = int64_t{1280} << 10;
class Arena {
 public:
  Arena() : next_(static_cast<char*>(scratch(ScratchUse::kThread, kTaskBytes))) {}
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }

 private:
  char* next_;
};

// What h and g of one call may take.
inline constexpr int64_t kCallBytes = int64_t{704} << 10;

// Low-rank products are summed in three steps, chains, blocks and the whole, for a library does a product with a vector
// in still shorter chains than one with a matrix. Such a block is a few chains long.
template <class T>
inline constexpr int kLowRankChain = sizeof(T) == 4 ? 8 : kDepth;
inline void add_block(const float* block, int64_t count, float* sums, bool first) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(sums + i, first ? load(block + i) : add(load(sums + i), load(block + i)));
}

// Multiplies by a double: rounding the factor to float32 first would be an error that all results share.
class Scale {
 public:
  explicit Scale(double s)
      : high_(splat(static_cast<float>(s))), low_(splat(static_cast<float>(s - static_cast<float>(s)))) {}
  F operator()(F v) const { return WordF32::multiply_add(v, high_, mul(v, low_)); }

 private:
  F high_, low_;
};

// Sums of one tile of lanes [rows][width] (tile-inl.h), lanes in memory order, to `count` lanes of the row-major `out`.
template <class T>
void store_transposed(const float* sums, int64_t rows, int64_t width, int64_t lanes, const T* bias, T* out,
                      int64_t stride) {
  for (int64_t l = 0; l < lanes; l += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      F v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (r + i < rows) {
          v[i] = load(sums + (r + i) * width + l);
          if (bias) v[i] = add(v[i], splat(to_float(bias[r + i])));
        } else {
          v[i] = zero();
        }
      }
      transpose(v);
      for (int i = 0; i < kLanes && l + i < lanes; ++i) store_some(out + (l + i) * stride + r, v[i], rows - r);
    }
  }
}

// The group of lanes [lane, lane + kGroup) of one row of sums (tile-inl.h): where to find its vectors.
inline void load_sums(const float* sums, int64_t rows, int64_t row, int64_t lane, int64_t lanes, F (&v)[4]) {
  for (int q = 0; q < 4; q += 2, lane += kTileLanes) {
    v[q] = v[q + 1] = zero();
    if (lane >= lanes) continue;
    const int64_t width = tile_width(lanes - lane);
    const float* in = sums + lane * rows + row * width;
    v[q] = load(in);
    if (width == kTileLanes) v[q + 1] = load(in + kLanes);
  }
}
