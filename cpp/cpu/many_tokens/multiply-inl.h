// The matrix multiplication of every kernel of this folder:
//
//   sums [height, lanes] (+)= broadcast panel [height, depth] · lanes panel [depth, lanes]
//
// The summed dimension is counted in *words*, which are one float32 element or two bfloat16 elements (WordF32,
// WordBf16). A step along the depth broadcasts one word of each row of the broadcast panel and multiplies it by a
// vector of the lanes panel, so neither operand is ever transposed for the other's sake:
//
// clang-format off
//                                lanes panel, step d:  [ l0 .. l15 ] [ l16 .. l31 ]     loaded, two vectors
//
//   broadcast panel, row 0:  .. w0 ..     w0 w0 .. w0  *  [ l0 .. l15 ] [ l16 .. l31 ]   ->  sum[0][0], sum[0][1]
//                    row 1:  .. w1 ..     w1 w1 .. w1  *  [ l0 .. l15 ] [ l16 .. l31 ]   ->  sum[1][0], sum[1][1]
//                            word d       `height` rows of sums, which stay in registers along the depth
// clang-format on
//
// With few lanes, neighbouring lanes take neighbouring words (TwoWords): a broadcast of two words then serves twice as
// many lanes, and the sums of neighbours are added at the end. The words that are broadcast together are a *step* of
// the depth.
//
// A *chain* of at most kChain steps is summed in registers, starting from zero, and added to memory once. Rounding
// errors grow with the length of a chain, not of the whole sum.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/unroll.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens {

using namespace panel;

inline constexpr int kDepth = 256;  // words of a row of a broadcast panel, [height][kDepth]

// Between multiplications, a core has to decode or prefetch the next weights. If the two alternate, each waits for the
// other. So a little of that work is done at every step along the depth of a tile: it is *interleaved*. Its type has
// step(constants), which a tile calls at every step with the result of constants(), which it keeps in registers. A
// WeightLinePrefetcher is interleaved work that only prefetches.

// One tile of `height` x `vectors` accumulators: `height` rows of the broadcast panel, and `vectors` vectors of lanes.
template <class W, int longest_chain, int height, int vectors, class Interleaved>
void multiply_tile(const typename W::Word* broadcast, const typename W::Word* lane, int depth, float* sums, bool first,
                   Interleaved& interleaved) {
  constexpr int kWidth = vectors * kLanes;
  const auto constants = interleaved.constants();
  for (; depth > 0; depth -= longest_chain, first = false) {
    F sum[height][vectors];
    unroll<height>([&](auto r) { unroll<vectors>([&](auto v) { sum[r.value][v.value] = zero(); }); });
    for (int d = depth < longest_chain ? depth : longest_chain; d > 0; --d, broadcast += W::kWords, lane += kWidth) {
      interleaved.step(constants);
      typename W::Vector x[vectors];
      unroll<vectors>([&](auto v) { x[v.value] = W::load(lane + v.value * kLanes); });
      unroll<height>([&](auto r) {
        const auto w = W::broadcast(broadcast + r.value * kDepth);
        unroll<vectors>([&](auto v) { sum[r.value][v.value] = W::multiply_add(w, x[v.value], sum[r.value][v.value]); });
      });
    }
    unroll<height>([&](auto r) {
      unroll<vectors>([&](auto v) {
        float* out = sums + r.value * kWidth + v.value * kLanes;
        store(out, first ? sum[r.value][v.value] : add(load(out), sum[r.value][v.value]));
      });
    });
  }
}

template <class W, class Interleaved>
using MultiplyTile = void (*)(const typename W::Word*, const typename W::Word*, int, float*, bool, Interleaved&);

// multiply_tile<..., height, vectors, ...> by height, 1 .. kAccumulators / vectors
template <class W, int longest_chain, int vectors, class Interleaved>
struct Tiles {
  static constexpr int kMostHeight = kAccumulators / vectors;
  MultiplyTile<W, Interleaved> by_height[kMostHeight + 1] = {};
  constexpr Tiles() { unroll_constexpr<kMostHeight>(); }

 private:
  template <int height>
  constexpr void unroll_constexpr() {
    if constexpr (height > 0) {
      unroll_constexpr<height - 1>();
      by_height[height] = multiply_tile<W, longest_chain, height, vectors, Interleaved>;
    }
  }
};

// What a thread needs while it multiplies words W.
template <class W>
struct WordSession {};
template <class W>
  requires requires { typename W::Session; }
struct WordSession<W> : W::Session {};

// Multiplies all rows of a broadcast panel with one tile of lanes, in tiles of nearly equal height: a low tile for the
// last rows would leave most of the accumulators idle. Words of a tile unit do it themselves.
template <class W, int longest_chain, int vectors, class Interleaved>
void multiply_by_tiles(const typename W::Word* broadcast, int64_t height, const typename W::Word* lanes, int depth,
                       float* sums, bool first, Interleaved& interleaved) {
  if constexpr (requires { W::template multiply_panels<vectors>; }) {
    W::template multiply_panels<vectors>(broadcast, height, lanes, depth, sums, first);
  } else {
    static constexpr Tiles<W, longest_chain, vectors, Interleaved> kTiles;
    constexpr int64_t kWidth = vectors * kLanes;
    const int64_t tiles = ceil_div(height, kTiles.kMostHeight);
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
      const int64_t of_tile = (height - row) / (tiles - t);
      kTiles.by_height[of_tile](broadcast + row * kDepth, lanes, depth, sums + row * kWidth, first, interleaved);
      row += of_tile;
    }
  }
}

// A lanes panel is cut into tiles of kTileLanes lanes. The last one is one vector wide if that is enough. The layout is
// [tile][depth][width], that of the sums [tile][height][width].
inline constexpr int kTileLanes = 2 * kLanes;
inline int64_t tile_width(int64_t lanes_left) { return lanes_left > kLanes ? kTileLanes : kLanes; }

// The longest chain, in steps. Its rounding errors are invisible in 16-bit results. In float32 they should be no larger
// than those of a library, which sums many short chains.
template <class T>
inline constexpr int kChain = sizeof(T) == 4 ? 32 : kDepth;

template <class W, int longest_chain, class Interleaved>
void multiply(const typename W::Word* broadcast, int64_t height, const typename W::Word* lanes_panel, int64_t lanes,
              int depth, float* sums, bool first, Interleaved& interleaved) {
  for (int64_t l = 0; l < lanes; l += kTileLanes) {
    if (lanes - l > kLanes) {
      multiply_by_tiles<W, longest_chain, 2>(broadcast, height, lanes_panel + l * depth, depth, sums + l * height,
                                             first, interleaved);
    } else {
      multiply_by_tiles<W, longest_chain, 1>(broadcast, height, lanes_panel + l * depth, depth, sums + l * height,
                                             first, interleaved);
    }
  }
}

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
