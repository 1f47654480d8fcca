// The inner loops of the integer sums of dx: pairs of weight rows, and in float32 the fallbacks.
//
// Both add to sums [group][token][4][kLanes], where vector s of a group holds the columns of nibble s (row_pairs.h).
#pragma once

#include <cstdint>

#include "cpp/cpu/few_tokens/dx_int_round-inl.h"
#include "cpp/cpu/few_tokens/slabs-inl.h"
#include "cpp/cpu/isa/row_pairs.h"
#include "cpp/cpu/isa/stream.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/unroll.h"
#include "cpp/cpu/verdict/columns-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace few_tokens {

using namespace stream;
using namespace verdict;

// Adds kPairs pairs of weight rows for kTokens tokens. The lower row of a pair lies `to_lower` bytes after the upper
// one. `pairs` [pair][token][kDxStripGroups] is dy times the scales of both rows (dx_int_round-inl.h). This is a
// function of its own, and has no loop over pairs, because GCC would keep pointers in memory and copy sums back and
// forth.
template <int kTokens, int kPairs>
[[gnu::noinline, gnu::flatten]] void add_pairs(const IntCodebook& codebook, const uint8_t* packed, int64_t row_bytes,
                                               int64_t to_lower, int64_t groups, const int32_t* pairs,
                                               const float* unit, float* sums, StripLinePrefetcher prefetcher) {
  // A pass sums as many of the four nibbles as registers hold sums for, of all tokens.
  constexpr int kNibbles = kTokens <= 5 ? 4 : kTokens <= 12 ? 2 : 1;
  const IntCodebook book = codebook;
  for (int64_t b = 0; b < groups; ++b, packed += kDxColumns / 2, ++pairs, sums += kTokens * kDxColumns) {
    unroll<4 / kNibbles>([&](auto pass) {
      Ints acc[kTokens][kNibbles];
      unroll<kTokens>([&](auto i) { unroll<kNibbles>([&](auto s) { acc[i][s] = no_ints(); }); });
      const uint8_t* upper = packed;
      unroll<kPairs>([&](auto j) {
        if (pass == 0) prefetcher.step();
        const Ints words = load_row_pair(upper, upper + to_lower);
        Ints codes[kNibbles];
        unroll<kNibbles>([&](auto s) { codes[s] = decode_nibble<pass * kNibbles + s>(words, book); });
        unroll<kTokens>([&](auto i) {
          const Ints pair = splat_pair(pairs[(j * kTokens + i) * kDxStripGroups]);
          unroll<kNibbles>([&](auto s) { acc[i][s] = dot(acc[i][s], codes[s], pair); });
        });
        upper += 2 * row_bytes;
      });
      unroll<kTokens>([&](auto i) {
        unroll<kNibbles>([&](auto s) {
          float* sum = sums + i * kDxColumns + (pass * kNibbles + s) * kLanes;
          store(sum, fma(to_floats(acc[i][s]), splat(unit[i]), load(sum)));
        });
      });
    });
  }
}

// Adds the tokens and groups of a tile that fall back.
template <class T>
[[gnu::noinline]] void add_fallbacks(const LinearDxProblem& p, const uint8_t* packed, int64_t n, int64_t last_row,
                                     int64_t groups, const RoundedTile& tile, float* all_sums) {
  const FloatCodebook book(p.w.table().value);
  const int64_t rows = last_row - n < kDxTileRows ? last_row - n : kDxTileRows, row_bytes = p.w.k / 2;
  for (int64_t i = 0; i < p.m; ++i) {
    const T* dy = static_cast<const T*>(p.dy) + i * p.w.n + n;
    for (int64_t b = 0; b < groups; ++b) {
      if (tile.serves(i, b)) continue;
      float* const sums = all_sums + (b * p.m + i) * kDxColumns;
      Floats sum[4];
      unroll<4>([&](auto s) { sum[s] = load(sums + s * kLanes); });
      for (int64_t t = 0; t < rows; ++t) {
        const Ints words = load_words(packed + t * row_bytes + b * (kDxColumns / 2));
        const Floats by = splat(tile.scales[t * kDxScaleStride + b] * to_float(dy[t]));
        unroll<4>([&](auto s) { sum[s] = fma(decode_nibble<s>(words, book), by, sum[s]); });
      }
      unroll<4>([&](auto s) { store(sums + s * kLanes, sum[s]); });
    }
  }
}

}  // namespace few_tokens
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
