// The fused linear layer by tiles, y = x · wᵀ + h · bᵀ + bias, as W · xᵀ.
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

// y of rows [row, row + rows) of W and pairs [pair, pair + pairs) of the panel's tokens.
class ForwardTask {
 public:
  ForwardTask(const LinearProblem& p, const Slices& slices, const DensePanel& panel, int64_t first_token, int64_t row,
              int64_t rows, int64_t pair, int64_t pairs)
      : p_(p),
        slices_(slices),
        panel_(panel),
        first_token_(first_token),
        row_(row),
        rows_(rows),
        pair_(pair),
        pairs_(pairs) {
    Carver memory(scratch(ScratchUse::kThread, many_tokens::kTaskBytes));
    weight_ = memory.take<char>(Slices::kMostSteps * 2 * kTileBytes);
    done_[0] = memory.take<char>(kBlockBytes);
    done_[1] = memory.take<char>(kBlockBytes);
    scales_ = memory.take<float>(ScaledPiece::scale_floats(rows, p.w.k));
    if (slices.count() > 1) sums_ = memory.take<char>(ceil_div(rows, kPair) * pairs * kBlockBytes);
  }

  void operator()() {
    const ScaledPiece source(p_.w, {row_, rows_, 0, p_.w.k}, scales_);
    for (int64_t i = 0; i < slices_.count(); ++i) {
      const Slice s = slices_[i];
      const bool first = i == 0, last = i == slices_.count() - 1;
      char* sums = sums_;
      for (int64_t r = 0; r < rows_; r += kPair) {
        const int64_t row = row_ + r, rows = min(kPair, rows_ - r);
        decode_rows(source, row, rows, s.begin, s.size, weight_);
        char* const ranks = weight_ + s.element_steps() * 2 * kTileBytes;
        if (s.ranks) fill_rows<many_tokens::Order::kMemory>(b_, row, rows, s.first_rank, s.ranks, ranks);
        Fetch fetch = fetch_after(s, r);
        for (int64_t q = 0; q < pairs_; ++q, sums += kBlockBytes) {
          const int64_t pair = pair_ + q;
          char* const out = last ? done_[0] : sums;
          multiply_block<WeightIs::kA>(panel_.tiles_of(pair), weight_, panel_.piece(s, pair), s.steps, sums, first, out,
                                       fetch);
          if (last) {
            finish();
            finished_ = {done_[0], row, rows, pair};
            char* const other = done_[1];
            done_[1] = done_[0], done_[0] = other;
          }
        }
      }
    }
    finish();
  }

 private:
  struct Block {
    const char* sums;
    int64_t row, rows, pair;
  };

  // The packed weights that come after the next strip.
  Fetch fetch_after(const Slice& s, int64_t r) const {
    const int64_t k = p_.w.k, next = row_ + r + 2 * kPair;
    const int64_t steps = pairs_ * s.steps;
    const int64_t rows = min(kPair, p_.w.n - next);
    return rows > 0 ? Fetch(p_.w, next * k + s.begin, rows, s.size, steps) : Fetch();
  }

  // Writes the block that was summed before the last one: by now the tile unit has it ready.
  void finish() {
    if (!finished_.sums) return;
    const Block& b = finished_;
    const bfloat16* const bias = p_.bias ? static_cast<const bfloat16*>(p_.bias) + b.row : nullptr;
    const int64_t tiles = panel_.tiles_of(b.pair);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t token = b.pair * kPair + t * kTileRows, tokens = min(kTileRows, panel_.tokens - token);
      F v[kLanes];
      unroll<kLanes>([&](auto i) {
        constexpr int kRow = 2 * i.value;
        const char* const in = b.sums + kRow / kTileRows * tiles * kTileBytes + t * kTileBytes + kRow % kTileRows * kRowBytes;
        F row = load_row(in), next = load_row(in + kRowBytes);
        if (bias) {
          if (kRow < b.rows) row = add(row, splat(to_float(bias[kRow])));
          if (kRow + 1 < b.rows) next = add(next, splat(to_float(bias[kRow + 1])));
        }
        v[i.value] = Words::as_floats(Words::round_pair(row, next));
      });
      transpose(v);
      bfloat16* const out = static_cast<bfloat16*>(p_.y) + (first_token_ + token) * p_.w.n + b.row;
      for (int64_t i = 0; i < tokens; ++i) Words::store_pairs(out + i * p_.w.n, Words::as_words(v[i]), b.rows);
    }
    finished_.sums = nullptr;
  }

  const LinearProblem& p_;
  const Slices& slices_;
  const DensePanel& panel_;
  const int64_t first_token_, row_, rows_, pair_, pairs_;
  const Matrix<bfloat16> b_{static_cast<const bfloat16*>(p_.lora.b), p_.lora.rank};
  char *weight_, *sums_ = nullptr, *done_[2];
  float* scales_;
  Block finished_ = {};
};

inline void forward(const Pool& pool, const LinearProblem& p) {
  const int64_t k = p.w.k, rank = p.lora.rank;
  const Slices slices(k, rank, false);
  const Cut chunk = chunks(p.m, k);
  const Matrix<bfloat16> x{static_cast<const bfloat16*>(p.x), k};
  const Matrix<bfloat16> dropped{static_cast<const bfloat16*>(p.x), k, p.lora.dropout};
  const Matrix<bfloat16> a{static_cast<const bfloat16*>(p.lora.a), k};
  for (int64_t first = 0; first < p.m; first += chunk.size) {
    DensePanel panel{nullptr, min(chunk.size, p.m - first)};
    const int64_t panel_bytes = panel.token_tiles() * slices.steps() * kTileBytes;
    const int64_t factor_bytes = rank ? slices.steps() * 2 * kTileBytes : 0;
    panel.tiles = static_cast<char*>(scratch(ScratchUse::kCall, panel_bytes + factor_bytes));
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Slice s = slices[i / panel.pairs()];
        const int64_t pair = i % panel.pairs();
        fill_dense_pair<WeightIs::kA>(x, first + pair * kPair, min(kPair, panel.tokens - pair * kPair), s.begin, s.size,
                                      panel.piece(s, pair));
      }
    };
    pool(slices.element_slices() * panel.pairs(), 1, pack);
    if (rank) add_low_rank<WeightIs::kA>(pool, dropped, first, a, p.lora, slices, panel, panel.tiles + panel_bytes);
    const int64_t most_rows = panel_bytes <= (1280 << 10) ? kPair : 512;
    const Grid grid = many_tokens::make_grid(pool.threads, p.w.n, most_rows, kPair, panel.tokens, panel.tokens);
    auto body = [&](int64_t begin, int64_t end) {
      const tiles::Session session;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % grid.rows.count * grid.rows.size, token = i / grid.rows.count * grid.tokens.size;
        ForwardTask task(p, slices, panel, first, row, min(grid.rows.size, p.w.n - row), token / kPair,
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
