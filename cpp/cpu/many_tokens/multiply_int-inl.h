// The matrix multiplication of integers:
//
//   sums [height, lanes] (+)= unit [lanes] · sum over chains (scale [height, chain] · int32 sum over a chain)
//
// The panels are those of multiply-inl.h, in words of two int16 (WordInt). A chain of kIntChain words has one scale per
// row of the broadcast panel and is summed exactly, whatever the order. The lanes, which are tokens, have a unit per
// piece of the summed dimension.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/tuning.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

inline constexpr int kMostChains = kDepth / 16;  // of a row of a broadcast panel

// Words of a chain. The fewer there are, the smaller the step to which x is rounded may be (round_int-inl.h).
template <class T>
inline constexpr int kIntChain = kMantissaBits<T> == 7 ? 32 : 16;

// A piece of the summed dimension as operands.
struct IntPanels {
  const WordInt::Word* broadcast;  // [height][kDepth]
  const float* scales;             // [height][kMostChains]
  const WordInt::Word* lanes;      // [tile][depth][width], from the piece's first word on
  const float* units;              // [lanes]
  int chains;
};

template <int chain, int height, int vectors>
void multiply_int_tile(const IntPanels& in, float* sums, bool first, WeightLinePrefetcher& prefetcher) {
  constexpr int kWidth = vectors * kLanes;
  const WordInt::Word *broadcast = in.broadcast, *lane = in.lanes;
  F total[height][vectors];
  unroll<height>([&](auto r) { unroll<vectors>([&](auto v) { total[r.value][v.value] = zero(); }); });
  for (int c = 0; c < in.chains; ++c) {
    prefetcher.step();
    WordInt::Sum sum[height][vectors];
    unroll<height>([&](auto r) { unroll<vectors>([&](auto v) { sum[r.value][v.value] = WordInt::no_sum(); }); });
    for (int d = 0; d < chain; ++d, ++broadcast, lane += kWidth) {
      WordInt::Vector x[vectors];
      unroll<vectors>([&](auto v) { x[v.value] = WordInt::load(lane + v.value * kLanes); });
      unroll<height>([&](auto r) {
        const auto w = WordInt::broadcast(broadcast + r.value * kDepth);
        unroll<vectors>(
            [&](auto v) { sum[r.value][v.value] = WordInt::multiply_add(w, x[v.value], sum[r.value][v.value]); });
      });
    }
    unroll<height>([&](auto r) {
      const F scale = splat(in.scales[r.value * kMostChains + c]);
      unroll<vectors>([&](auto v) {
        total[r.value][v.value] =
            multiply_add(WordInt::to_floats(sum[r.value][v.value]), scale, total[r.value][v.value]);
      });
    });
  }
  unroll<height>([&](auto r) {
    unroll<vectors>([&](auto v) {
      float* const out = sums + r.value * kWidth + v.value * kLanes;
      const F unit = load(in.units + v.value * kLanes), t = total[r.value][v.value];
      store(out, first ? mul(t, unit) : multiply_add(t, unit, load(out)));
    });
  });
}

// multiply_int_tile<chain, height, vectors> by height, 1 .. kAccumulators / vectors
template <int chain, int vectors>
struct IntTiles {
  using Tile = void (*)(const IntPanels&, float*, bool, WeightLinePrefetcher&);
  static constexpr int kMostHeight = kAccumulators / vectors;
  Tile by_height[kMostHeight + 1] = {};
  constexpr IntTiles() { fill<kMostHeight>(); }

 private:
  template <int height>
  constexpr void fill() {
    if constexpr (height > 0) {
      fill<height - 1>();
      by_height[height] = multiply_int_tile<chain, height, vectors>;
    }
  }
};

template <int chain, int vectors>
void multiply_int_by_tiles(IntPanels in, int64_t height, float* sums, bool first, WeightLinePrefetcher& prefetcher) {
  static constexpr IntTiles<chain, vectors> kTiles;
  const int64_t tiles = ceil_div(height, kTiles.kMostHeight);
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t of_tile = (height - row) / (tiles - t);
    kTiles.by_height[of_tile](in, sums + row * vectors * kLanes, first, prefetcher);
    row += of_tile, in.broadcast += of_tile * kDepth, in.scales += of_tile * kMostChains;
  }
}

// The product of a broadcast panel and one tile of up to kTileLanes lanes.
template <int chain>
void multiply_int(const IntPanels& in, int64_t height, int64_t lanes, float* sums, bool first,
                  WeightLinePrefetcher& prefetcher) {
  if (lanes > kLanes) {
    multiply_int_by_tiles<chain, 2>(in, height, sums, first, prefetcher);
  } else {
    multiply_int_by_tiles<chain, 1>(in, height, sums, first, prefetcher);
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
