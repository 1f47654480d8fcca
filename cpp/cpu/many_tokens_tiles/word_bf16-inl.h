// Pairs of bfloat16 as words of the panels of many_tokens/multiply-inl.h, which a tile unit multiplies: 16 rows of the
// broadcast panel are a, 16 words of 16 lanes are b. So many_tokens_int8 multiplies its low-rank products.
#pragma once

#include <cstdint>

#include "cpp/cpu/isa/panel.h"
#include "cpp/cpu/isa/tiles.h"
#include "cpp/cpu/many_tokens/multiply-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/unroll.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

struct TileWordBf16 : panel::WordBf16 {
  using Session = tiles::Session;

  // Rows of a tile beyond `height` are those that follow the panel's, multiplied for nothing. The words of the last
  // tile beyond `depth` are zeros.
  template <int vectors>
  static void multiply_panels(const Word* broadcast, int64_t height, const Word* lanes, int depth, float* sums,
                              bool first) {
    constexpr int kA = 4, kB = 6, kTileWords = 16;
    constexpr int64_t kWidth = vectors * panel::kLanes, kRows = 16;
    alignas(64) Word last_lanes[kTileWords * kWidth] = {}, last_rows[kRows * kTileWords] = {};
    alignas(64) float products[vectors][kRows * panel::kLanes];
    const int whole = depth & -kTileWords;
    __builtin_memcpy(last_lanes, lanes + whole * kWidth, static_cast<size_t>((depth - whole) * kWidth) * sizeof(Word));
    const auto multiply_tiles = [&](const Word* lane) {
      unroll<vectors>([&](auto v) {
        tiles::load<kB + v.value, 4 * kWidth>(lane + v.value * panel::kLanes);
        tiles::dot<v.value, kA, kB + v.value>();
      });
    };
    for (; height > 0; height -= kRows, broadcast += kRows * many_tokens::kDepth) {
      const int64_t rows = min(height, kRows);
      for (int64_t r = 0; r < rows && whole < depth; ++r) {
        __builtin_memcpy(last_rows + r * kTileWords, broadcast + r * many_tokens::kDepth + whole,
                         static_cast<size_t>(depth - whole) * sizeof(Word));
      }
      unroll<vectors>([](auto v) { tiles::zero<v.value>(); });
      for (int d = 0; d < whole; d += kTileWords) {
        tiles::load<kA, 4 * many_tokens::kDepth>(broadcast + d);
        multiply_tiles(lanes + d * kWidth);
      }
      if (whole < depth) {
        tiles::load<kA>(last_rows);
        multiply_tiles(last_lanes);
      }
      unroll<vectors>([&](auto v) { tiles::store<v.value>(products[v.value]); });
      for (int64_t r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v, sums += panel::kLanes) {
          const panel::F product = panel::load(products[v] + r * panel::kLanes);
          panel::store(sums, first ? product : panel::add(panel::load(sums), product));
        }
      }
    }
  }
};

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
