// The multiplication of every kernel of this folder. It multiplies two *pieces* made of hardware tiles:
//
//   sums (+)= a · b, with W in a and the tokens in b (y = W · xᵀ), or the tokens in a and W in b (dx = dy · W)
//
// A tile is 16 rows of 64 bytes, 1 KB. A *step* is 32 elements of the summed dimension: two tiles of W and two (or one)
// of the tokens. Their four (or two) tiles of sums are an *output tile*. The steps of a piece are contiguous in memory:
//
// clang-format off
//   piece of W      [ step 0: w0 w1 ][ step 1: w0 w1 ] ..      32 KB of 16 steps, from the first-level cache
//   dense piece     [ step 0: x0 x1 ][ step 1: x0 x1 ] ..      32 tokens, from the second-level cache
//
//   sums            [ w0x0 w0x1 w1x0 w1x1 ]                    float32, 4 KB, in the tile unit during the steps
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/tiles.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

inline constexpr int64_t kTileRows = 16, kTileBytes = 1024;
inline constexpr int64_t kStep = 32;                         // elements of the summed dimension
inline constexpr int64_t kPair = 2 * kTileRows;              // tokens, or rows or columns of W, of two tiles
inline constexpr int64_t kOutputTileBytes = 4 * kTileBytes;  // of sums

enum class WeightIs { kA, kB };

// `dense_tiles` is 1 or 2. interleaved.step() is called after each step, for other work.
template <WeightIs weight_is, int dense_tiles, class Interleaved>
void multiply_output_tile(const char* weight, const char* dense, int64_t steps, const char* sums, bool first, char* out,
                          Interleaved& interleaved) {
  constexpr int kWeight = 4, kDense = 6;  // numbers of tiles; those of sums begin at 0
  constexpr bool kTwo = dense_tiles == 2;
  if (first) {
    tiles::zero<0>();
    tiles::zero<1>();
    if constexpr (kTwo) tiles::zero<2>();
    if constexpr (kTwo) tiles::zero<3>();
  } else {
    tiles::load<0>(sums);
    tiles::load<1>(sums + kTileBytes);
    if constexpr (kTwo) tiles::load<2>(sums + 2 * kTileBytes);
    if constexpr (kTwo) tiles::load<3>(sums + 3 * kTileBytes);
  }
  for (; steps > 0; --steps, weight += 2 * kTileBytes, dense += dense_tiles * kTileBytes) {
    tiles::load_streamed<kDense>(dense);
    tiles::load<kWeight>(weight);
    tiles::load<kWeight + 1>(weight + kTileBytes);
    if constexpr (kTwo) tiles::load_streamed<kDense + 1>(dense + kTileBytes);
    if constexpr (weight_is == WeightIs::kA) {
      tiles::dot<0, kWeight, kDense>();
      tiles::dot<dense_tiles, kWeight + 1, kDense>();
      if constexpr (kTwo) tiles::dot<1, kWeight, kDense + 1>();
      if constexpr (kTwo) tiles::dot<3, kWeight + 1, kDense + 1>();
    } else {
      tiles::dot<0, kDense, kWeight>();
      tiles::dot<dense_tiles, kDense, kWeight + 1>();
      if constexpr (kTwo) tiles::dot<1, kDense + 1, kWeight>();
      if constexpr (kTwo) tiles::dot<3, kDense + 1, kWeight + 1>();
    }
    interleaved.step();
  }
  tiles::store<0>(out);
  tiles::store<1>(out + kTileBytes);
  if constexpr (kTwo) tiles::store<2>(out + 2 * kTileBytes);
  if constexpr (kTwo) tiles::store<3>(out + 3 * kTileBytes);
}

template <WeightIs weight_is, class Interleaved>
void multiply_output_tile(int64_t dense_tiles, const char* weight, const char* dense, int64_t steps, const char* sums,
                          bool first, char* out, Interleaved& interleaved) {
  if (dense_tiles == 2) {
    multiply_output_tile<weight_is, 2>(weight, dense, steps, sums, first, out, interleaved);
  } else {
    multiply_output_tile<weight_is, 1>(weight, dense, steps, sums, first, out, interleaved);
  }
}

// No interleaved work.
struct Nothing {
  void step() {}
};

// How the summed dimension, `depth` elements and then the rank, is cut into slices. The tile unit holds an output
// tile's sums over one slice. A slice begins at a multiple of kGroup weights. The cut depends on the problem alone,
// since the order of the sums depends on the cut.
struct Slice {
  int64_t begin, size;          // elements
  int64_t first_rank, ranks;    // after them
  int64_t steps_before, steps;  // of all slices before this one, and of this one
  int64_t element_steps() const { return steps - rank_steps(); }
  int64_t rank_steps() const { return ceil_div(ranks, kStep); }
};
class Slices {
 public:
  // Elements of a slice: kMost, which are 32 KB of W; kMostAlone if one slice holds them all; a multiple of kGroup.
  static constexpr int64_t kMost = 512, kMostAlone = 640, kGroup = 64;
  static constexpr int64_t kMostRanksBeside = 64, kMostSteps = kMostAlone / kStep + kMostRanksBeside / kStep;

  // Slices of at most `most` elements. With `rank_first`, the slices of ranks alone come before all others.
  Slices(int64_t depth, int64_t most, int64_t rank, bool rank_first)
      : depth_(depth), rank_(rank), rank_first_(rank_first) {
    elements_ = depth <= kMostAlone && most == kMost ? 1 : ceil_div(depth, most);
    size_ = max(round_up(ceil_div(depth, elements_), kGroup), kGroup);
    elements_ = max(ceil_div(depth, size_), 1);
    beside_ = !rank_first && rank <= kMostRanksBeside;
    alone_ = beside_ ? 0 : ceil_div(rank, kMost);
  }
  int64_t count() const { return elements_ + alone_; }
  int64_t element_slices() const { return elements_; }
  int64_t rank_slices_first() const { return rank_first_ ? alone_ : 0; }
  int64_t steps() const { return element_steps() + ceil_div(rank_, kStep); }
  Slice operator[](int64_t i) const {
    const int64_t steps_of_slice = size_ / kStep;
    const int64_t rank_steps = ceil_div(rank_, kStep);
    int64_t e = rank_first_ ? i - alone_ : i;
    if (e >= 0 && e < elements_) {
      const int64_t begin = e * size_, size = min(size_, depth_ - begin);
      const int64_t ranks = beside_ && e == elements_ - 1 ? rank_ : 0;
      return {begin,
              size,
              0,
              ranks,
              (rank_first_ ? rank_steps : 0) + e * steps_of_slice,
              round_up(size, kGroup) / kStep + ceil_div(ranks, kStep)};
    }
    const int64_t r = rank_first_ ? i : i - elements_;
    const int64_t ranks = min(kMost, rank_ - r * kMost);
    return {0, 0, r * kMost, ranks, (rank_first_ ? 0 : element_steps()) + r * (kMost / kStep), ceil_div(ranks, kStep)};
  }
  // The slice that contains a rank.
  Slice of_rank(int64_t rank) const {
    if (beside_) return (*this)[elements_ - 1];
    return (*this)[(rank_first_ ? 0 : elements_) + rank / kMost];
  }

 private:
  int64_t element_steps() const { return round_up(depth_, kGroup) / kStep; }

  int64_t depth_, rank_, elements_, size_, alone_;
  bool rank_first_, beside_;
};

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
