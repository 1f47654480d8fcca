// The matrix multiplication of int8, in the panels of multiply-inl.h with words of four int8 (WordInt8). A *segment* is
// kInt8Segment elements of the summed dimension, over which the rounded operand has one unit. Forward and dX differ in
// which operand is broadcast, and in what belongs to it:
//
//   forward  sums [row, token]    += unit [token, block] · (scale [row, block] · int32 sum
//                                                           + offset [row, block] · int32 sum of x [token, block])
//   dX       sums [token, column] += unit [token, segment] · int32 sum
//
// A block is one of W inside a segment, or the segment if blocks are larger. Its unit is that of the segment, or 0
// beside an infinity in another block. Sums of a block, in dX of a segment, are exact. They are added in their order,
// in float32. Where instructions multiply unsigned by signed bytes, something is added to all bytes that are broadcast,
// and sums start from minus that times the sum of the lanes' bytes.
//
// An instruction that multiplies matrices takes two rows (B::kRows) and two lanes at once, and two words of each. Words
// that meet in a matrix are neighbours in both panels:
//
// clang-format off
//   broadcast   row 0: words 0, 1   row 1: words 0, 1   row 0: words 2, 3   row 1: words 2, 3   ..   then rows 2 and 3
//   lanes       lane 0: words 0, 1   lane 1: words 0, 1   ..   the last lane: words 0, 1   lane 0: words 2, 3   ..
// clang-format on
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/int8_segment-inl.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/format/portable.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

inline constexpr int kLeastInt8Block = 16;

template <int height, int vectors>
inline void load_totals(const float* sums, bool first, F (&total)[height][vectors]) {
  unroll<height>([&](auto r) {
    unroll<vectors>([&](auto v) {
      total[r.value][v.value] = first ? zero() : load(sums + (r.value * vectors + v.value) * kLanes);
    });
  });
}
template <int height, int vectors>
inline void store_totals(const F (&total)[height][vectors], float* sums) {
  unroll<height>([&](auto r) {
    unroll<vectors>([&](auto v) { store(sums + (r.value * vectors + v.value) * kLanes, total[r.value][v.value]); });
  });
}

// Sums that start from those at `from`, which are zeros if nothing is added to bytes.
template <class B, int broadcasts, int vectors>
QLORA_INLINE void start_sums(const int32_t* from, typename B::Sum (&sum)[broadcasts][vectors]) {
  unroll<vectors>([&](auto v) {
    auto start = B::splat_sum(0);
    if constexpr (B::kAddedToDy != 0) start = B::load_sum(from + v.value * kLanes);
    unroll<broadcasts>([&](auto r) { sum[r.value][v.value] = start; });
  });
}

// Adds the products of `words` words, a multiple of B::kPartialSteps, to sums of int32. Rows of the broadcast panel are
// `stride` words long.
template <class B, int stride, int broadcasts, int vectors>
QLORA_INLINE void add_products(const int32_t* broadcast, const int32_t* lane, int words,
                               typename B::Sum (&sum)[broadcasts][vectors]) {
  constexpr int kRows = B::kRows;
  const auto add_steps = [&](int steps, auto& to) {
    for (int d = 0; d < steps; d += kRows, broadcast += kRows * kRows, lane += vectors * kLanes * kRows) {
      typename B::Vector x[vectors];
      unroll<vectors>([&](auto v) { x[v.value] = B::load(lane + v.value * kLanes * kRows); });
      unroll<broadcasts>([&](auto r) {
        const auto w = B::broadcast(broadcast + r.value * kRows * stride);
        unroll<vectors>([&](auto v) { to[r.value][v.value] = B::multiply_add(w, x[v.value], to[r.value][v.value]); });
      });
    }
  };
  if constexpr (B::kPartialSteps == 0) {
    add_steps(words, sum);
  } else {
    for (int d = 0; d < words; d += B::kPartialSteps) {
      typename B::Partial partial[broadcasts][vectors];
      unroll<broadcasts>(
          [&](auto r) { unroll<vectors>([&](auto v) { partial[r.value][v.value] = B::no_partial(); }); });
      add_steps(B::kPartialSteps, partial);
      unroll<broadcasts>([&](auto r) {
        unroll<vectors>(
            [&](auto v) { sum[r.value][v.value] = B::add_partial(partial[r.value][v.value], sum[r.value][v.value]); });
      });
    }
  }
}

// The unit that multiplies words B: the rows of its tiles of outputs, the words of a row of W's panel and the bytes of
// the panel, and the products themselves. This is the vector unit (many_tokens_tiles/multiply_int8-inl.h: the tile
// unit). A thread may use it while it has a Session.
template <class B>
struct Int8Unit {
  static constexpr int kHeight = kInt8Height, kPanelDepth = kDepth;
  static constexpr int64_t kPanelBytes = int64_t{24} << 10;
  static constexpr bool kUnrollsBlocks = true;  // so that the compiler needs to know their size
  struct Session {
    explicit Session(int /*words_of_block*/) {}
  };

  // Calls use(block, sum) for each block of `words` words, where sum(row, vector) are the block's sums as floats. Rows
  // of the broadcast panel are `stride` words long.
  template <int stride, int height, int vectors, class Panels, class Use>
  QLORA_INLINE static void for_each_block(const Panels& in, int words, int blocks, WeightLinePrefetcher& prefetcher,
                                          const Use& use) {
    constexpr int kRows = B::kRows;
    const int32_t *broadcast = in.broadcast, *lane = in.lanes;
    for (int block = 0; block < blocks; ++block, broadcast += words * kRows, lane += words * vectors * kLanes) {
      prefetcher.step();
      typename B::Sum sum[ceil_div(height, kRows)][vectors];
      start_sums<B>(in.starts + block * in.stride, sum);
      add_products<B, stride>(broadcast, lane, words, sum);
      use(block, [&](auto r, auto v) { return B::to_floats(sum[r / kRows][v.value], r % kRows); });
    }
  }
};

// A piece of the forward's summed dimension as operands.
template <class B>
struct ForwardInt8Panels {
  static constexpr int kDepth = Int8Unit<B>::kPanelDepth;
  static constexpr int kMostBlocks = 4 * kDepth / kLeastInt8Block;  // of a row

  const int32_t* broadcast;  // W [height][kDepth]
  const int32_t* lanes;      // x [depth][width], from the piece's first word on
  const float* scales;       // [height][kMostBlocks]
  const float* offsets;      // likewise, or null
  const float* units;        // [block][lane], blocks `stride` apart
  const int32_t* starts;     // likewise, what sums start from
  const float* x_sums;       // likewise, for offsets
  int64_t stride;
  int words, blocks;  // words of a block; or segments, where blocks are larger

  void skip_rows(int64_t rows) {
    broadcast += rows * kDepth, scales += rows * kMostBlocks;
    if (offsets) offsets += rows * kMostBlocks;
  }
};

// words_of_block is 0 where the compiler does not need to know it.
template <class B, int words_of_block>
struct ForwardInt8Tile {
  static constexpr int kRows = B::kRows;
  using Unit = Int8Unit<B>;
  using Panels = ForwardInt8Panels<B>;

  template <int height, int vectors>
  static void multiply(const Panels& in, float* sums, bool first, WeightLinePrefetcher& prefetcher) {
    F total[height][vectors];
    load_totals(sums, first, total);
    Unit::template for_each_block<Panels::kDepth, height, vectors>(
        in, words_of_block ? words_of_block : in.words, in.blocks, prefetcher,
        [&](int64_t block, const auto& sum) QLORA_INLINE_LAMBDA {
          const float* const units = in.units + block * in.stride;
          const auto add = [&](auto has_offsets) QLORA_INLINE_LAMBDA {
            unroll<height>([&](auto r) {
              const F scale = splat(in.scales[r.value * Panels::kMostBlocks + block]);
              unroll<vectors>([&](auto v) {
                F of_block = mul(sum(r, v), scale);
                if constexpr (has_offsets.value) {
                  const F x_sum = load(in.x_sums + block * in.stride + v.value * kLanes);
                  of_block = multiply_add(x_sum, splat(in.offsets[r.value * Panels::kMostBlocks + block]), of_block);
                }
                total[r.value][v.value] =
                    multiply_add(of_block, load(units + v.value * kLanes), total[r.value][v.value]);
              });
            });
          };
          in.offsets ? add(Index<true>{}) : add(Index<false>{});
        });
    store_totals(total, sums);
  }
};

// A piece of dX's summed dimension, rows of W, as operands.
struct DxInt8Panels {
  static constexpr int kDepth = 64, kMostSegments = kDepth / kSegmentWords;

  const int32_t* broadcast;  // dy · scale [height][kDepth]
  const int32_t* lanes;      // W [depth][width]
  const float* units;        // [segment][row], segments `unit_stride` apart
  const int32_t* starts;     // [segment][lane], what sums start from, segments `stride` apart
  int64_t unit_stride, stride;
  int segments;

  void skip_rows(int64_t rows) { broadcast += rows * kDepth, units += rows; }
};

template <class B>
struct DxInt8Tile {
  static constexpr int kRows = B::kRows;
  using Unit = Int8Unit<B>;
  using Panels = DxInt8Panels;

  template <int height, int vectors>
  static void multiply(const Panels& in, float* sums, bool first, WeightLinePrefetcher& prefetcher) {
    F total[height][vectors];
    load_totals(sums, first, total);
    Unit::template for_each_block<Panels::kDepth, height, vectors>(
        in, kSegmentWords, in.segments, prefetcher, [&](int64_t segment, const auto& sum) QLORA_INLINE_LAMBDA {
          unroll<height>([&](auto r) {
            const F unit = splat(in.units[segment * in.unit_stride + r.value]);
            unroll<vectors>(
                [&](auto v) { total[r.value][v.value] = multiply_add(sum(r, v), unit, total[r.value][v.value]); });
          });
        });
    store_totals(total, sums);
  }
};

// Tile::multiply<height, vectors> by height.
template <class Tile, int vectors>
struct Int8TilesByHeight {
  static constexpr int kMost = Tile::Unit::kHeight;
  void (*of[kMost + 1])(const typename Tile::Panels&, float*, bool, WeightLinePrefetcher&) = {};
  constexpr Int8TilesByHeight() { fill<kMost>(); }

 private:
  template <int height>
  constexpr void fill() {
    if constexpr (height > 0) {
      fill<height - 1>();
      of[height] = Tile::template multiply<height, vectors>;
    }
  }
};

// The product of a broadcast panel and one tile of `vectors` vectors of lanes, in tiles of nearly equal height that
// begin at a multiple of Tile::kRows.
template <class Tile, int vectors>
void multiply_int8(typename Tile::Panels in, int64_t height, float* sums, bool first,
                   WeightLinePrefetcher& prefetcher) {
  static constexpr Int8TilesByHeight<Tile, vectors> kTiles;
  const int64_t tiles = ceil_div(height, kTiles.kMost);
  for (int64_t t = 0, row = 0; t < tiles; ++t) {
    const int64_t of_tile = min(round_up((height - row) / (tiles - t), Tile::kRows), height - row);
    kTiles.of[of_tile](in, sums + row * vectors * kLanes, first, prefetcher);
    row += of_tile, in.skip_rows(of_tile);
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
