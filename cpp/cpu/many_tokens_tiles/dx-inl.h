// The input gradient by tiles, dx = dy · w + mask ∘ (g · a) · keep_scale.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens_tiles/low_rank-inl.h"
#include "cpp/cpu/many_tokens_tiles/multiply-inl.h"
#include "cpp/cpu/many_tokens_tiles/operands-inl.h"
#include "cpp/cpu/many_tokens_tiles/tasks-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

// dx of columns [column, column + columns) of W, from a multiple of 64 on, and pairs [pair, pair + pairs) of the panel's
// tokens. Columns are taken 64 at a time, which become two pieces.
class DxTask {
 public:
  static constexpr int64_t kColumns = 64;

  DxTask(const LinearDxProblem& p, const Slices& slices, const DensePanel& panel, int64_t first_token, int64_t column,
         int64_t columns, int64_t pair, int64_t pairs)
      : p_(p),
        slices_(slices),
        panel_(panel),
        first_token_(first_token),
        column_(column),
        columns_(columns),
        pair_(pair),
        pairs_(pairs) {
    Carver memory(scratch(ScratchUse::kThread, many_tokens::kTaskBytes));
    weight_ = memory.take<char>(2 * kPieceBytes);
    done_[0] = memory.take<char>(kBlockBytes);
    done_[1] = memory.take<char>(kBlockBytes);
    scales_ = memory.take<float>(ScaledPiece::scale_floats(Slices::kMostAlone, columns));
    if (slices.count() > 1) sums_ = memory.take<char>(ceil_div(columns, kPair) * pairs * kBlockBytes);
  }

  void operator()() {
    for (int64_t i = 0; i < slices_.count(); ++i) {
      const Slice s = slices_[i];
      const bool first = i == 0, last = i == slices_.count() - 1;
      if (i == slices_.rank_slices_first() && i > 0) drop_sums();
      const ScaledPiece source(p_.w, {s.begin, s.size, column_, columns_}, scales_);
      char* sums = sums_;
      for (int64_t c = 0; c < columns_; c += kColumns) {
        const int64_t column = column_ + c;
        const Fetch all = fetch_after(s, c);
        Fetch fetch = all;
        decode_columns(source, s.begin, s.size, column, columns_ - c, weight_, kPieceBytes);
        for (int64_t h = 0; h < kColumns && c + h < columns_; h += kPair) {
          char* const piece = weight_ + h / kPair * kPieceBytes;
          const int64_t columns = min(kPair, columns_ - c - h);
          char* const ranks = piece + s.element_steps() * 2 * kTileBytes;
          if (s.ranks) fill_columns(a_, s.first_rank, s.ranks, column + h, columns, ranks);
          for (int64_t q = 0; q < pairs_; ++q, sums += kBlockBytes) {
            const int64_t pair = pair_ + q;
            char* const out = last ? done_[0] : sums;
            multiply_block<WeightIs::kB>(panel_.tiles_of(pair), piece, panel_.piece(s, pair), s.steps, sums, first, out,
                                         fetch);
            if (last) {
              finish();
              finished_ = {done_[0], column + h, columns, pair};
              char* const other = done_[1];
              done_[1] = done_[0], done_[0] = other;
            }
          }
        }
      }
    }
    finish();
  }

 private:
  static constexpr int64_t kPieceBytes = Slices::kMostSteps * 2 * kTileBytes;
  static constexpr int64_t kFetched = 128;  // columns: a line of packed weights
  struct Block {
    const char* sums;
    int64_t column, columns, pair;
  };

  // The packed weights of the columns that come next.
  Fetch fetch_after(const Slice& s, int64_t c) const {
    if (c % kFetched) return {};
    const int64_t next = c + kFetched;
    const int64_t steps = 2 * min(pairs_ * s.steps, 1 << 20);
    if (next < columns_)
      return Fetch(p_.w, s.begin * p_.w.k + column_ + next, s.size, min(kFetched, columns_ - next), steps);
    const int64_t row = s.begin + s.size;
    return Fetch(p_.w, row * p_.w.k + column_, min(s.size, p_.w.n - row), min(kFetched, columns_), steps);
  }

  // The dropout of the low-rank part, which is all that is summed so far.
  void drop_sums() {
    const Scale keep_scale(p_.lora.dropout.keep_scale);
    const F all = splat(1.0f);
    char* sums = sums_;
    for (int64_t c = 0; c < columns_; c += kPair) {
      const int64_t columns = min(kPair, columns_ - c);
      for (int64_t q = 0; q < pairs_; ++q, sums += kBlockBytes) {
        const int64_t tiles = panel_.tiles_of(pair_ + q), token = (pair_ + q) * kPair;
        for (int64_t t = 0; t < min(kPair, panel_.tokens - token); ++t) {
          const Mask mask(p_.lora.dropout, (first_token_ + token + t) * p_.w.k + column_ + c, columns);
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

  // Writes the block that was summed before the last one: by now the tile unit has it ready.
  void finish() {
    if (!finished_.sums) return;
    const Block& b = finished_;
    const int64_t tiles = panel_.tiles_of(b.pair), token = b.pair * kPair;
    bfloat16* out = static_cast<bfloat16*>(p_.dx) + (first_token_ + token) * p_.w.k + b.column;
    for (int64_t t = 0; t < min(kPair, panel_.tokens - token); ++t, out += p_.w.k) {
      const char* const row = b.sums + t / kTileRows * kTileBytes + t % kTileRows * kRowBytes;
      Words::store_pairs(out, Words::round_pair(load_row(row), load_row(row + tiles * kTileBytes)), b.columns);
    }
    finished_.sums = nullptr;
  }

  const LinearDxProblem& p_;
  const Slices& slices_;
  const DensePanel& panel_;
  const int64_t first_token_, column_, columns_, pair_, pairs_;
  const Matrix<bfloat16> a_{static_cast<const bfloat16*>(p_.lora.a), p_.w.k};
  char *weight_, *sums_ = nullptr, *done_[2];
  float* scales_;
  Block finished_ = {};
};

inline void dx(const Pool& pool, const LinearDxProblem& p) {
  const int64_t n = p.w.n, rank = p.lora.rank;
  const Slices slices(n, rank, p.lora.dropout.active());
  const Cut chunk = chunks(p.m, n);
  const Matrix<bfloat16> dy{static_cast<const bfloat16*>(p.dy), n}, b{static_cast<const bfloat16*>(p.lora.b), rank};
  for (int64_t first = 0; first < p.m; first += chunk.size) {
    DensePanel panel{nullptr, min(chunk.size, p.m - first)};
    const int64_t panel_bytes = panel.token_tiles() * slices.steps() * kTileBytes;
    const int64_t factor_bytes = rank ? slices.steps() * 2 * kTileBytes : 0;
    panel.tiles = static_cast<char*>(scratch(ScratchUse::kCall, panel_bytes + factor_bytes));
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Slice s = slices[slices.rank_slices_first() + i / panel.pairs()];
        const int64_t pair = i % panel.pairs();
        fill_dense_pair<WeightIs::kB>(dy, first + pair * kPair, min(kPair, panel.tokens - pair * kPair), s.begin, s.size,
                                      panel.piece(s, pair));
      }
    };
    pool(slices.element_slices() * panel.pairs(), 1, pack);
    if (rank) add_low_rank<WeightIs::kB>(pool, dy, first, b, p.lora, slices, panel, panel.tiles + panel_bytes);
    const int64_t pairs = panel.pairs();
    const int64_t most_columns = min(max((512 << 10) / (pairs * kBlockBytes) * kPair, 512) & -128, 2048);
    const Grid grid = many_tokens::make_grid(pool.threads, p.w.k, most_columns, DxTask::kColumns, panel.tokens, panel.tokens);
    auto body = [&](int64_t begin, int64_t end) {
      const tiles::Session session;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i % grid.rows.count * grid.rows.size, token = i / grid.rows.count * grid.tokens.size;
        DxTask task(p, slices, panel, first, column, min(grid.rows.size, p.w.k - column), token / kPair,
                    ceil_div(min(grid.tokens.size, panel.tokens - token), kPair));
        task();
      }
    };
    pool(grid.tasks(), 1, body);
  }
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
