// The loop of the forward and of dx: pieces of W are decoded one after the other and multiplied with all pairs of
// tokens.
//
//   for each bundle of pieces along the outer dimension of W (y: rows, dx: columns), whose sums stay in the cache
//     for each slice of the summed dimension
//       for each piece of the bundle, 32 rows or columns
//         for each pair of tokens: an output tile
//
// While a core multiplies tiles, its vector unit is free. But out-of-order execution reaches only a few steps ahead,
// because each row of a tile is a load and a step has 64 of them. So other work is interleaved in small parts between
// the steps of an output tile (InterleavedWork): the first output tile that reads a piece decodes it one step ahead,
// the previous output tile is rounded and written, and the next operands are prefetched.
#pragma once

#include <cstdint>

#include "cpp/cpu/many_tokens_tiles/low_rank-inl.h"
#include "cpp/cpu/many_tokens_tiles/multiply-inl.h"
#include "cpp/cpu/many_tokens_tiles/operands-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/prefetch-inl.h"
#include "cpp/cpu/shared/scratch.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

// The complete sums of a piece of W and a pair of tokens.
struct OutputTile {
  const char* sums = nullptr;
  int64_t outer = 0, count = 0;  // W's rows or columns [outer, outer + count)
  int64_t pair = 0;              // of the panel's tokens
};

// Tokens [first_token, first_token + panel.tokens) of a product, and where their output goes.
struct Batch {
  DensePanel panel;
  int64_t first_token;
  bfloat16* output;  // of all tokens, [m, output_columns]
  int64_t output_columns;

  // The output for the panel's token `token` and W's row or column `outer`.
  bfloat16* at(int64_t token, int64_t outer) const { return output + (first_token + token) * output_columns + outer; }
};

// The work between the steps of an output tile. Op is Forward or Dx.
template <class Op>
class InterleavedWork {
 public:
  InterleavedWork(const Op& op) : op_(op) {}

  void begin_tile(const char* next_sums, bfloat16* output) { step_ = 0, next_sums_ = next_sums, output_ = output; }
  void step() {
    if (next_sums_) {
      for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(next_sums_ + i * kCacheLine, 0, 3);
      next_sums_ += 4 * kCacheLine;
    }
    if (output_) {
      __builtin_prefetch(output_, 1, 3);
      __builtin_prefetch(output_ + op_.batch().output_columns, 1, 3);
      output_ += 2 * op_.batch().output_columns;
    }
    prefetcher.step();
    decoder.step();
    ++step_;
    if (finished.sums && (step_ == kFirstTile || step_ == kSecondTile)) op_.finish(finished, step_ == kSecondTile);
  }
  void end_tile() {
    if (!finished.sums) return;
    if (step_ < kFirstTile) op_.finish(finished, 0);
    if (step_ < kSecondTile) op_.finish(finished, 1);
    finished.sums = nullptr;
  }

  LinePrefetcher prefetcher;     // of packed weights
  typename Op::Decoder decoder;  // of the piece that the first output tile multiplies
  OutputTile finished;           // the previous output tile, to be rounded and written

 private:
  // The steps after which the two tiles of tokens of `finished` are written.
  static constexpr int64_t kFirstTile = 4, kSecondTile = 10;
  const Op& op_;
  int64_t step_ = 0;
  const char* next_sums_ = nullptr;
  bfloat16* output_ = nullptr;
};

// A rectangle of the output: rows or columns [begin, begin + size) of W, and pairs [pair, pair + pairs) of tokens.
struct Rectangle {
  int64_t begin, size, pair, pairs;
};

template <class Op>
class Product {
 public:
  Product(const Op& op, const Slices& slices, const Rectangle& task)
      : op_(op), slices_(slices), task_(task), bundle_(op.bundle(slices, task)), interleaved_(op) {
    Carver sizes(nullptr);
    carve(sizes);
    Carver memory(scratch(ScratchUse::kThread, sizes.used()));
    carve(memory);
  }

  void operator()() {
    Place place{task_.begin, 0, task_.begin};
    while (place.piece < end()) place = multiply(place);
    interleaved_.begin_tile(nullptr, nullptr);  // end_tile() writes the last output tile
    interleaved_.end_tile();
  }

 private:
  struct Place {
    int64_t bundle, slice, piece;  // the first row or column of the bundle, the slice, the first of the piece
  };
  int64_t end() const { return task_.begin + task_.size; }
  int64_t count(int64_t begin, int64_t most) const { return min(most, end() - begin); }
  Place after(Place p) const {
    p.piece += kPair;
    if (p.piece < min(p.bundle + bundle_, end())) return p;
    p.piece = p.bundle;
    if (++p.slice < slices_.count()) return p;
    p.slice = 0;
    p.bundle += bundle_;
    return {p.bundle, 0, p.bundle};
  }

  void carve(Carver& memory) {
    pieces_ = memory.take<char>(Op::kPiecesPerDecode * kPieceBytes);
    done_ = memory.take<char>(kOutputTileBytes);
    other_done_ = memory.take<char>(kOutputTileBytes);
    scales_ = memory.take<float>(op_.scale_floats(bundle_));
    sums_ = memory.take<char>(slices_.count() > 1 ? ceil_div(bundle_, kPair) * task_.pairs * kOutputTileBytes : 0);
  }

  void decode(const Place& p, const Slice& s) {
    if (p.piece == p.bundle && (p.slice == 0 || Op::kScalesOfSlice))
      source_ = op_.source(p.bundle, count(p.bundle, bundle_), s, scales_);
    const int64_t together = min(count(p.piece, Op::kPiecesPerDecode * kPair), p.bundle + bundle_ - p.piece);
    interleaved_.decoder = typename Op::Decoder(source_, p.piece, together, s, pieces_, kPieceBytes);
    for (int64_t i = 0; i < Op::Decoder::kStepsAhead; ++i) interleaved_.decoder.step();
    for (int64_t i = 0; s.ranks && i < together; i += kPair) {
      char* const ranks = pieces_ + i / kPair * kPieceBytes + s.element_steps() * 2 * kTileBytes;
      op_.fill_ranks(p.piece + i, min(kPair, together - i), s, ranks);
    }
  }

  Place multiply(const Place& p) {
    const Slice s = slices_[p.slice];
    const bool first = p.slice == 0, last = p.slice == slices_.count() - 1;
    if (p.piece == p.bundle && p.slice == slices_.rank_slices_first() && p.slice > 0)
      op_.drop(sums_, {p.bundle, count(p.bundle, bundle_), task_.pair, task_.pairs});
    char* sums = sums_ + (p.piece - p.bundle) / kPair * task_.pairs * kOutputTileBytes;
    interleaved_.prefetcher =
        op_.prefetcher({p.bundle, count(p.bundle, bundle_), task_.pair, task_.pairs}, p.piece, slices_, p.slice);
    const int64_t of_pieces = (p.piece - p.bundle) / kPair % Op::kPiecesPerDecode;
    if (of_pieces == 0) decode(p, s);
    const char* const piece = pieces_ + of_pieces * kPieceBytes;
    for (int64_t q = 0; q < task_.pairs; ++q, sums += kOutputTileBytes) {
      const int64_t pair = task_.pair + q;
      const Batch& batch = op_.batch();
      interleaved_.begin_tile(first ? nullptr : sums + kOutputTileBytes,
                              last ? batch.at(pair * kPair, p.piece) : nullptr);
      multiply_output_tile<Op::kWeightIs>(batch.panel.tiles_of(pair), piece, batch.panel.piece(s, pair), s.steps, sums,
                                          first, last ? done_ : sums, interleaved_);
      interleaved_.end_tile();
      if (last) {
        interleaved_.finished = {done_, p.piece, count(p.piece, kPair), pair};
        char* const other = other_done_;
        other_done_ = done_, done_ = other;
      }
    }
    return after(p);
  }

  static constexpr int64_t kPieceBytes = Slices::kMostSteps * 2 * kTileBytes;

  const Op& op_;
  const Slices& slices_;
  const Rectangle task_;
  const int64_t bundle_;  // rows or columns of a bundle
  InterleavedWork<Op> interleaved_;
  ScaledPiece source_;
  char *pieces_, *sums_, *done_, *other_done_;
  float* scales_;
};

// A pool that consists of the calling thread.
inline const Pool kThisThread = {[](int64_t count, int64_t, Pool::Body body, void* context) {
                                   if (count > 0) body(context, 0, count);
                                   return true;
                                 },
                                 1};

// Multiplies the tokens [first, first + tokens) of `p`. `in` [m, depth] is the dense operand, `factor` makes the
// low-rank intermediate from it, and `out` [m, outer] is the output: its columns are the rows or columns of W that are
// not summed.
template <class Op>
void run_batch(const Pool& pool, const typename Op::Problem& p, int64_t first, int64_t tokens,
               const Matrix<bfloat16>& in, const Matrix<bfloat16>& factor, const Slices& slices, bfloat16* out,
               int64_t outer) {
  const Lora& lora = p.lora;
  const Matrix<bfloat16> all{in.data, in.stride};
  DensePanel panel{nullptr, tokens};
  const int64_t panel_bytes = panel.token_tiles() * slices.steps() * kTileBytes;
  const int64_t factor_bytes = lora.rank ? slices.steps() * 2 * kTileBytes : 0;
  panel.tiles = static_cast<char*>(scratch(ScratchUse::kCall, panel_bytes + factor_bytes));
  auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Slice s = slices[slices.rank_slices_first() + i / panel.pairs()];
      const int64_t pair = i % panel.pairs(), token = pair * kPair;
      fill_dense_pair<Op::kWeightIs>(all, first + token, min(kPair, tokens - token), s.begin, s.size,
                                     panel.piece(s, pair));
    }
  };
  pool(slices.element_slices() * panel.pairs(), 1, pack);
  if (lora.rank)
    add_low_rank<Op::kWeightIs>(pool, in, first, factor, lora, slices, panel, panel.tiles + panel_bytes,
                                Op::saved_low_rank(p));
  const Op op(p, {panel, first, out, outer});
  // The panel is packed once for all tasks, and a tile unit multiplies faster than weights are decoded.
  constexpr int64_t kDecodes = 128, kReads = 16;
  const Grid grid = make_grid(pool.threads, 0, {{outer, outer, kPair, kDecodes}, {tokens, tokens, kPair, kReads}});
  auto body = [&](int64_t begin, int64_t end) {
    const tiles::Session session;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % grid.rows.count * grid.rows.size, token = i / grid.rows.count * grid.tokens.size;
      const Rectangle task{row, min(grid.rows.size, outer - row), token / kPair,
                           ceil_div(min(grid.tokens.size, tokens - token), kPair)};
      Product<Op> product(op, slices, task);
      product();
    }
  };
  pool(grid.tasks(), 1, body);
}

// With enough tokens, each thread has batches of its own: their panels stay in its cache, and no thread waits for
// another. Otherwise all threads share a batch, and each takes some rows or columns of W. W is decoded again for each
// batch, so a thread's batch should not be smaller than a shared one, unless W is small.
template <class Op>
void run(const Pool& pool, const typename Op::Problem& p, const Matrix<bfloat16>& in, const Matrix<bfloat16>& factor,
         const Slices& slices, void* output, int64_t outer) {
  bfloat16* const out = static_cast<bfloat16*>(output);
  const int64_t m = p.m;
  constexpr int64_t kLeast = 256, kSmallWeight = 1 << 20, kMostBytes = int64_t{16} << 20;  // of a panel
  const int64_t depth = max(in.stride, 1);
  const int64_t fit = max(min(max(kPanelBytes / (2 * depth), kLeast), kMostBytes / (2 * depth)) & -kPair, kPair);
  const int64_t least_alone = in.stride * outer <= kSmallWeight ? kLeast / 2 : kLeast;
  if (m >= pool.threads * least_alone) {
    const int64_t rounds = ceil_div(m, pool.threads * fit);
    const Cut batch = cut_by_count(m, pool.threads * rounds, kPair);
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * batch.size;
        run_batch<Op>(kThisThread, p, first, min(batch.size, m - first), in, factor, slices, out, outer);
      }
    };
    pool(batch.count, 1, body);
  } else {
    const Cut batch = many_tokens::cut(m, fit, kPair);
    for (int64_t first = 0; first < m; first += batch.size)
      run_batch<Op>(pool, p, first, min(batch.size, m - first), in, factor, slices, out, outer);
  }
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
