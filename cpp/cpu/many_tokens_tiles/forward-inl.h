// The fused linear layer in a tile unit, y = x · wᵀ + h · bᵀ + bias. It is computed as yᵀ = w · xᵀ + ..., so W is a.
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

class Forward {
 public:
  using Problem = LinearProblem;
  using Decoder = RowsDecoder;
  static constexpr WeightIs kWeightIs = WeightIs::kA;
  static constexpr bool kScalesOfSlice = false;
  static constexpr int64_t kPiecesPerDecode = 1;

  Forward(const Problem& p, const Batch& batch) : p_(p), batch_(batch) {}
  const Batch& batch() const { return batch_; }
  static bfloat16* saved_low_rank(const Problem& p) { return static_cast<bfloat16*>(p.h); }

  // The rows of a bundle: as many as the second-level cache can hold sums for, beside one slice of the panel. If the
  // cache has room for the whole panel, a bundle is one piece, so that W is read in memory order.
  int64_t bundle(const Slices& slices, const Rectangle& rectangle) const {
    if (batch_.panel.token_tiles() * slices.steps() * kTileBytes <= kPanelBytes) return kPair;
    int64_t rows = min(kSumBytes / (rectangle.pairs * kOutputTileBytes), kMostRows / kPair) * kPair;
    while (rows > kPair && scale_floats(rows) > kMostScales) rows -= kPair;
    return min(max(rows, kPair), round_up(rectangle.size, kPair));
  }

  int64_t scale_floats(int64_t rows) const { return ScaledPiece::run_floats(p_.w, rows); }
  ScaledPiece source(int64_t row, int64_t rows, const Slice&, float* scales) const {
    return ScaledPiece(p_.w, {row, rows, 0, p_.w.k}, scales);
  }
  void fill_ranks(int64_t row, int64_t rows, const Slice& s, char* out) const {
    const Matrix<bfloat16> b{static_cast<const bfloat16*>(p_.lora.b), p_.lora.rank};
    fill_rows<many_tokens::Order::kMemory>(b, row, rows, s.first_rank, s.ranks, out);
  }
  void drop(char*, const Rectangle&) const {}

  // If a bundle is one piece of rows, W is read as one stream, and each slice of a piece prefetches a slice's bytes:
  // those of the next piece, kSlicesAhead slices further on. Otherwise each piece prefetches the piece after the next
  // one.
  LinePrefetcher prefetcher(const Rectangle& bundle, int64_t row, const Slices& slices, int64_t slice) const {
    const int64_t steps = bundle.pairs * slices[slice].steps, end = bundle.begin + bundle.size;
    const Weight& w = p_.w;
    if (bundle.size <= kPair) {
      const int64_t bytes = w.bytes(kPair * w.k) / slices.count();
      const int64_t at = w.bytes(row * w.k) + (slice + slices.count() + kSlicesAhead) * bytes;
      return LinePrefetcher(w.packed + at, 1, min(bytes, w.bytes(w.n * w.k) - at), 0, steps);
    }
    for (int i = 0; i < 2; ++i) {
      row += kPair;
      if (row < end) continue;
      row = bundle.begin;
      if (++slice == slices.count()) slice = 0, row = end;
    }
    if (row >= w.n) return {};
    const Slice s = slices[slice];
    return LinePrefetcher(w.packed + w.bytes(row * w.k + s.begin), min(kPair, w.n - row), w.bytes(s.size), w.bytes(w.k),
                          steps);
  }

  // Rounds and writes tile `t` of the tokens of an output tile, transposed.
  void finish(const OutputTile& done, int64_t t) const {
    const int64_t tiles = batch_.panel.tiles_of(done.pair), token = done.pair * kPair + t * kTileRows;
    if (t >= tiles) return;
    const bfloat16* const bias = p_.bias ? static_cast<const bfloat16*>(p_.bias) + done.outer : nullptr;
    F v[kLanes];
    unroll<kLanes>([&](auto i) {
      constexpr int kRow = 2 * i.value;
      const char* const in = done.sums + (kRow / kTileRows * tiles + t) * kTileBytes + kRow % kTileRows * kRowBytes;
      F row = load_row(in), next = load_row(in + kRowBytes);
      if (bias) {
        if (kRow < done.count) row = add(row, splat(to_float(bias[kRow])));
        if (kRow + 1 < done.count) next = add(next, splat(to_float(bias[kRow + 1])));
      }
      v[i.value] = Words::as_floats(Words::round_pair(row, next));
    });
    transpose(v);
    bfloat16* const out = batch_.at(token, done.outer);
    const int64_t tokens = min(kTileRows, batch_.panel.tokens - token);
    for (int64_t i = 0; i < tokens; ++i) Words::store_pairs(out + i * p_.w.n, Words::as_words(v[i]), done.count);
  }

 private:
  static constexpr int64_t kSumBytes = int64_t{512} << 10, kMostRows = 512;
  static constexpr int64_t kMostScales = int64_t{64} << 10, kSlicesAhead = 2;
  const Problem& p_;
  const Batch batch_;
};

inline void forward(const Pool& pool, const LinearProblem& p) {
  const Slices slices(p.w.k, Slices::kMost, p.lora.rank, false);
  const Matrix<bfloat16> x{static_cast<const bfloat16*>(p.x), p.w.k, p.lora.dropout};
  const Matrix<bfloat16> a{static_cast<const bfloat16*>(p.lora.a), p.w.k};
  run<Forward>(pool, p, x, a, slices, p.y, p.w.n);
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
