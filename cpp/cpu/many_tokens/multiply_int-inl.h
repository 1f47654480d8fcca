// The matrix multiplication of integers:
//
//   sums [height, lanes] (+)= unit [lanes] · sum over chains (scale [height, chain] · int32 sum over a chain
//                                                             + offset [height, chain] · sum of lanes [chain, lanes])
//
// The panels are those of multiply-inl.h, in words of two int16 (WordInt). A chain has one scale per row of the
// broadcast panel and is summed exactly, whatever the order. The lanes have a unit per piece of the summed dimension.
// Offsets are those of weights that have them, in the forward.
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

// Words of a chain, 64 or 32 elements. In a short one, the step to which x is rounded may be smaller (round_int-inl.h),
// and so may a quantization block.
inline constexpr int kLongChain = 32, kShortChain = 16;
inline constexpr int kMostChains = kDepth / kShortChain;  // of a row of a broadcast panel

// A piece of the summed dimension as operands.
struct IntPanels {
  const WordInt::Word* broadcast;  // [height][kDepth]
  const float* scales;             // [height][kMostChains]
  const WordInt::Word* lanes;      // [tile][depth][width], from the piece's first word on
  const float* units;              // [lanes]
  int chains;
  const float* offsets = nullptr;    // [height][kMostChains]
  const float* lane_sums = nullptr;  // of a chain's elements in each lane, chains `sums_stride` apart
  int64_t sums_stride = 0;
};

template <int chain, bool kHasOffsets, int height, int vectors>
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
    if constexpr (kHasOffsets) {
      F of_lanes[vectors];
      unroll<vectors>([&](auto v) { of_lanes[v.value] = load(in.lane_sums + c * in.sums_stride + v.value * kLanes); });
      unroll<height>([&](auto r) {
        const F offset = splat(in.offsets[r.value * kMostChains + c]);
        unroll<vectors>([&](auto v) {
          total[r.value][v.value] = multiply_add(of_lanes[v.value], offset, total[r.value][v.value]);
        });
      });
    }
  }
  unroll<height>([&](auto r) {
    unroll<vectors>([&](auto v) {
      float* const out = sums + r.value * kWidth + v.value * kLanes;
      const F unit = load(in.units + v.value * kLanes), t = total[r.value][v.value];
      store(out, first ? mul(t, unit) : multiply_add(t, unit, load(out)));
    });
  });
}

// multiply_int_tile<..., height, vectors> by height, 1 .. kAccumulators / vectors
template <int chain, bool kHasOffsets, int vectors>
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
      by_height[height] = multiply_int_tile<chain, kHasOffsets, height, vectors>;
    }
  }
};

template <int chain, bool kHasOffsets, int vectors>
void multiply_int_by_tiles(IntPanels in, int64_t height, float* sums, bool first, WeightLinePrefetcher& prefetcher) {
  static constexpr IntTiles<chain, kHasOffsets, vectors> kTiles;
  const int64_t tiles = ceil_div(height, kTiles.kMostHeight);
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t of_tile = (height - row) / (tiles - t);
    kTiles.by_height[of_tile](in, sums + row * vectors * kLanes, first, prefetcher);
    row += of_tile, in.broadcast += of_tile * kDepth, in.scales += of_tile * kMostChains;
    if constexpr (kHasOffsets) in.offsets += of_tile * kMostChains;
  }
}

// The product of a broadcast panel and one tile of up to kTileLanes lanes.
template <int chain, bool kHasOffsets = false>
void multiply_int(const IntPanels& in, int64_t height, int64_t lanes, float* sums, bool first,
                  WeightLinePrefetcher& prefetcher) {
  if (lanes > kLanes) {
    multiply_int_by_tiles<chain, kHasOffsets, 2>(in, height, sums, first, prefetcher);
  } else {
    multiply_int_by_tiles<chain, kHasOffsets, 1>(in, height, sums, first, prefetcher);
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
