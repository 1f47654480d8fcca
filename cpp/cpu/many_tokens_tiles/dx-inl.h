// The input gradient in a tile unit, dx = dy · w + mask ∘ (g · a) · keep_scale. W is b.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens_tiles/multiply-inl.h"
#include "cpp/cpu/many_tokens_tiles/operands-inl.h"
#include "cpp/cpu/many_tokens_tiles/product-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

class Dx {
 public:
  using Problem = LinearDxProblem;
  static constexpr int64_t kPiecesPerDecode = 4;  // whose columns are a cache line of packed weights
  using Decoder = ColumnsDecoder<kPiecesPerDecode>;
  static constexpr WeightIs kWeightIs = WeightIs::kB;
  static constexpr bool kScalesOfSlice = true;

  Dx(const Problem& p, const Batch& batch) : p_(p), batch_(batch) {}
  const Batch& batch() const { return batch_; }
  static bfloat16* saved_low_rank(const Problem& p) { return static_cast<bfloat16*>(p.g); }

  // The columns of a bundle: as many as the second-level cache can hold sums for, beside one slice of the panel.
  int64_t bundle(const Slices&, const Rectangle& rectangle) const {
    const int64_t columns = min(max(kSumBytes / (rectangle.pairs * kOutputTileBytes), 1) * kPair, kMostColumns);
    return min(columns, round_up(rectangle.size, kPair));
  }

  int64_t scale_floats(int64_t columns) const {
    return ScaledPiece::arrays(p_.w) * ScaledPiece::scale_floats(Slices::kMostAlone, columns + kPair);
  }
  ScaledPiece source(int64_t column, int64_t columns, const Slice& s, float* scales) const {
    const int64_t within = column % Slices::kGroup;
    return ScaledPiece(p_.w, {s.begin, s.size, column - within, columns + within}, scales);
  }
  void fill_ranks(int64_t column, int64_t columns, const Slice& s, char* out) const {
    const Matrix<bfloat16> a{static_cast<const bfloat16*>(p_.lora.a), p_.w.k};
    fill_columns(a, s.first_rank, s.ranks, column, columns, out, 0);
  }
  // Applies dropout to the sums, which at this point hold the low-rank part only.
  void drop(char* sums, const Rectangle& rectangle) const {
    if (!p_.lora.dropout.active()) return;
    const Scale keep_scale(p_.lora.dropout.keep_scale);
    const F all = splat(1.0f);
    for (int64_t c = 0; c < rectangle.size; c += kPair) {
      const int64_t columns = min(kPair, rectangle.size - c);
      for (int64_t q = 0; q < rectangle.pairs; ++q, sums += kOutputTileBytes) {
        const int64_t tiles = batch_.panel.tiles_of(rectangle.pair + q), token = (rectangle.pair + q) * kPair;
        for (int64_t t = 0; t < min(kPair, batch_.panel.tokens - token); ++t) {
          const Mask mask(p_.lora.dropout, (batch_.first_token + token + t) * p_.w.k + rectangle.begin + c, columns);
          F kept[2];
          unzip(mask(all, 0), mask(all, kLanes), kept[0], kept[1]);
          for (int64_t w = 0; w < 2; ++w) {
            char* const row = sums + (w * tiles + t / kTileRows) * kTileBytes + t % kTileRows * kRowBytes;
            store(reinterpret_cast<float*>(row), keep_scale(mul(load_row(row), kept[w])));
          }
        }
      }
    }
  }

  // Prefetches this piece's share of the bundle's next slice, row by row.
  LinePrefetcher prefetcher(const Rectangle& bundle, int64_t column, const Slices& slices, int64_t slice) const {
    const int64_t k = p_.w.k, pieces = ceil_div(bundle.size, kPair), piece = (column - bundle.begin) / kPair;
    const int64_t steps = bundle.pairs * slices[slice].steps;
    int64_t first = bundle.begin;
    if (++slice == slices.count()) slice = slices.rank_slices_first(), first += bundle.size;
    const Slice s = slices[slice];
    const int64_t share = ceil_div(s.size, pieces), row = s.begin + piece * share;
    const int64_t rows = min(share, s.begin + s.size - row), columns = min(bundle.size, k - first);
    if (rows <= 0 || columns <= 0) return {};
    const Weight& w = p_.w;
    return LinePrefetcher(w.packed + w.bytes(row * k + first), rows, w.bytes(columns), w.bytes(k), steps);
  }

  // Rounds and writes tile `t` of the tokens of an output tile.
  void finish(const OutputTile& done, int64_t t) const {
    const int64_t tiles = batch_.panel.tiles_of(done.pair), token = done.pair * kPair + t * kTileRows;
    if (t >= tiles) return;
    bfloat16* out = batch_.at(token, done.outer);
    const char* row = done.sums + t * kTileBytes;
    for (int64_t i = 0; i < min(kTileRows, batch_.panel.tokens - token); ++i, out += p_.w.k, row += kRowBytes)
      Words::store_pairs(out, Words::round_pair(load_row(row), load_row(row + tiles * kTileBytes)), done.count);
  }

 private:
  static constexpr int64_t kSumBytes = int64_t{512} << 10, kMostColumns = 2048;
  const Problem& p_;
  const Batch batch_;
};

inline void dx(const Pool& pool, const LinearDxProblem& p) {
  const Slices slices(p.w.n, p.m <= 64 ? 128 : Slices::kMost, p.lora.rank, p.lora.dropout.active());
  const Matrix<bfloat16> dy{static_cast<const bfloat16*>(p.dy), p.w.n};
  const Matrix<bfloat16> b{static_cast<const bfloat16*>(p.lora.b), p.lora.rank};
  run<Dx>(pool, p, dy, b, slices, p.dx, p.w.k);
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
