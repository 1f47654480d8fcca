// The tile unit as what multiplies int8 in the tasks of many_tokens/*_int8-inl.h. Rows of their panels are rows of
// tiles as they stand, and a tile is as deep as a block:
//
// clang-format off
//   broadcast panel, 12 rows     [ b0 b1 .. b63 ]               a: 12 rows of a block's 64 (32, 16) bytes
//
//   lanes panel, 16 (8, 4) words [ l0 .. l15 ] [ l16 .. l31 ]   b and b': words of 16 lanes each
//
//   sums                         [ s0 .. s15 ] [ s16 .. s31 ]   a · b and a · b', int32: stored, and read as vectors
// clang-format on
//
// What bounds the speed is not the tile unit, but what is done to its sums. In the forward, 12 x 32 outputs and a block
// of 64 take 24 to 32 cycles of tile products. Their 24 vectors take 72 instructions to be converted, scaled and added,
// which are 36 cycles of two ports, and 82 loads, which are 41: 12 rows of a, 32 of b, 24 of sums, 12 scales and 2
// units. docs/cpu_roofline.md has the other cases. 24 is as many vectors of totals as fit the registers. Were totals in
// memory, whole tiles in squares of 2 x 2 would load less, but store each total again for every other block.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/bytes.h"
#include "cpp/cpu/isa/tiles.h"
#include "cpp/cpu/many_tokens/multiply_int8-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/unroll.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

struct TileWordInt8 : panel::SignedWordInt8 {};  // which the tile unit multiplies

}  // namespace many_tokens_tiles

namespace many_tokens {

template <>
struct Int8Unit<many_tokens_tiles::TileWordInt8> {
  // A strip of 48 rows of W and 384 columns stays in the first-level cache, beside those of 32 tokens and their sums.
  static constexpr int kHeight = kAccumulators / 2, kPanelDepth = 96, kTileRows = 16;
  static constexpr int64_t kPanelBytes = int64_t{18} << 10;
  static constexpr bool kUnrollsBlocks = false;

  struct Session : tiles::Session {
    explicit Session(int words_of_block) : tiles::Session(kHeight, words_of_block) {}
  };

  // Tiles have kHeight rows also where `height` is less: what follows in the panel is multiplied for nothing. The
  // products of a block are computed while the previous block's are used.
  template <int stride, int height, int vectors, class Panels, class Use>
  QLORA_INLINE static void for_each_block(const Panels& in, int words, int blocks, WeightLinePrefetcher& prefetcher,
                                          const Use& use) {
    using Word = many_tokens_tiles::TileWordInt8;
    alignas(64) int32_t sums[2][vectors][kTileRows * kLanes];
    const auto multiply = [&](auto turn, int block) {
      constexpr int kSums = 2 * turn.value, kA = 4 + turn.value, kB = 6;
      const int32_t* const lane = in.lanes + block * words * vectors * kLanes;
      tiles::load<kA, 4 * stride>(in.broadcast + block * words);
      unroll<vectors>([&](auto v) {
        tiles::zero<kSums + v.value>();
        tiles::load<kB + v.value, 4 * vectors * kLanes>(lane + v.value * kLanes);
        tiles::dot_int8<kSums + v.value, kA, kB + v.value>();
      });
      unroll<vectors>([&](auto v) { tiles::store<kSums + v.value>(sums[turn.value][v.value]); });
    };
    multiply(Index<0>{}, 0);
    for (int block = 0; block < blocks; ++block) {
      const int next = block + 1;
      if (next < blocks) next % 2 ? multiply(Index<1>{}, next) : multiply(Index<0>{}, next);
      prefetcher.step();
      const auto& of_block = sums[block % 2];
      use(block, [&](auto r, auto v) { return Word::to_floats(Word::load_sum(of_block[v.value] + r.value * kLanes)); });
    }
  }
};

}  // namespace many_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
