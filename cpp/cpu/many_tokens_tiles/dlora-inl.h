// The gradients of the low-rank factors in a tile unit, dA = gᵀ · dropout(x) and dB = dyᵀ · h, which is computed as
// dBᵀ = hᵀ · dy. Both sum over tokens. The low-rank operand is a, and pairs of tokens of x or dy are b.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
#include "cpp/cpu/many_tokens_tiles/low_rank-inl.h"
#include "cpp/cpu/many_tokens_tiles/multiply-inl.h"
#include "cpp/cpu/many_tokens_tiles/operands-inl.h"
#include "cpp/cpu/shared/carver-inl.h"
#include "cpp/cpu/shared/instruction_set.h"
#include "cpp/cpu/shared/numbers-inl.h"
#include "cpp/cpu/shared/scratch.h"
#include "cpp/format/problem.h"

namespace qlora::cpu::QLORA_ISA {
namespace {
namespace many_tokens_tiles {

// Makes two tiles of 16 ranks by 32 tokens from an output tile of 32 ranks and a pair of tokens, which fill `tiles`
// tiles.
template <WeightIs weight_is>
void fill_low_rank_rows(const char* sums, int64_t tiles, double scale, char* out) {
  const Scale scaled(scale);
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t i = 0; i < 2; ++i) {
      F v[kLanes];
      for (int64_t r = 0; r < kTileRows; ++r)
        v[r] = t < tiles ? scaled(load_row(sums + (i * tiles + t) * kTileBytes + r * kRowBytes)) : zero();
      if constexpr (weight_is == WeightIs::kB) transpose(v);  // sums [token][even (i = 0) or odd ranks]
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t rank = weight_is == WeightIs::kA ? i * kTileRows + r : 2 * r + i;
        char* const row = out + rank / kTileRows * kTileBytes + rank % kTileRows * kRowBytes;
        store(reinterpret_cast<bfloat16*>(row) + t * kTileRows, v[r]);
      }
    }
  }
}

// Computes a strip of 32 ranks of h or g for a pair of tokens: two tiles, after those of the previous pairs.
template <WeightIs weight_is>
void fill_low_rank_strip(const Matrix<bfloat16>& in, int64_t pair, int64_t m, const Slices& slices, const char* factor,
                         double scale, const LowRankScratch& memory, char* out) {
  const DensePanel none{nullptr, m};
  low_rank_sums<weight_is>(in, 0, none, pair, slices, factor, memory);
  fill_low_rank_rows<weight_is>(memory.sums, none.tiles_of(pair), scale, out + pair * 2 * kTileBytes);
}

// Copies the same from a given h or g, [m, rank].
inline void copy_low_rank_strip(const Matrix<bfloat16>& low, int64_t pair, int64_t m, int64_t first_rank, int64_t ranks,
                                char* out) {
  for (int64_t t = 0; t < 2; ++t) {
    const int64_t token = pair * kPair + t * kTileRows;
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t rank = i * kTileRows;
      F v[kLanes];
      for (int64_t r = 0; r < kTileRows; ++r)
        v[r] = token + r < m ? many_tokens::load_some(low.at(token + r, first_rank + rank), ranks - rank) : zero();
      transpose(v);
      char* const tile = out + (pair * 2 + i) * kTileBytes;
      for (int64_t r = 0; r < kTileRows; ++r)
        store(reinterpret_cast<bfloat16*>(tile + r * kRowBytes) + t * kTileRows, v[r]);
    }
  }
}

// Columns [column, column + columns) of low [32 ranks, m] · in [m, features]. Each 32 columns are an output tile: the
// even and the odd columns of each 16 ranks.
class TokenSum {
 public:
  static constexpr int64_t kColumns = 4 * kPair;  // at a time: whole lines of a row
  static constexpr int64_t kSteps = 8;  // of a slice: with four pieces of columns, half of the first-level cache

  TokenSum() {
    Carver memory(scratch(ScratchUse::kThread, many_tokens::kTaskBytes));
    sums_ = memory.take<char>(kColumns / kPair * kOutputTileBytes);
    dense_ = memory.take<char>(kColumns / kPair * kPieceBytes);
    dropped_ = memory.take<bfloat16>(kSteps * kStep * Slices::kMostAlone);
  }
  // Calls finish(column, columns, sums) for each output tile.
  template <class Finish>
  void operator()(const char* low, const Matrix<bfloat16>& in, int64_t m, int64_t column, int64_t columns,
                  const Finish& finish) {
    for (int64_t first = 0; first == 0 || first < m; first += kSteps * kStep) {
      const int64_t tokens = min(kSteps * kStep, m - first), steps = ceil_div(tokens, kStep);
      if (in.dropout.active()) {
        drop(in, first, tokens, column, columns, dropped_);
        fill_columns({dropped_, Slices::kMostAlone}, 0, tokens, 0, columns, dense_, kPieceBytes);
      } else {
        fill_columns(in, first, tokens, column, columns, dense_, kPieceBytes);
      }
      for (int64_t c = 0; c < columns; c += kPair) {
        char* const sums = sums_ + c / kPair * kOutputTileBytes;
        Nothing nothing;
        multiply_output_tile<WeightIs::kA, 2>(low + first / kStep * 2 * kTileBytes, dense_ + c / kPair * kPieceBytes,
                                              steps, sums, first == 0, sums, nothing);
      }
    }
    for (int64_t c = 0; c < columns; c += kPair)
      finish(column + c, min(kPair, columns - c), sums_ + c / kPair * kOutputTileBytes);
  }

 private:
  static constexpr int64_t kPieceBytes = kSteps * 2 * kTileBytes;
  char *sums_, *dense_;
  bfloat16* dropped_;
};

inline void dlora(const Pool& pool, const LoraGradProblem& p) {
  const int64_t rank = p.lora.rank, m = p.m, pairs = ceil_div(m, kPair);
  const Matrix<bfloat16> x{static_cast<const bfloat16*>(p.x), p.k, p.lora.dropout};
  const Matrix<bfloat16> dy{static_cast<const bfloat16*>(p.dy), p.n};
  const Matrix<bfloat16> a{static_cast<const bfloat16*>(p.lora.a), p.k},
      b{static_cast<const bfloat16*>(p.lora.b), rank};
  const Matrix<bfloat16> given_h{static_cast<const bfloat16*>(p.h), rank},
      given_g{static_cast<const bfloat16*>(p.g), rank};
  const Slices of_k(p.k, Slices::kMost, 0, false), of_n(p.n, Slices::kMost, 0, false);
  Carver sizes(nullptr);
  const auto carve = [&](Carver& memory, char*(&out)[4]) {
    out[0] = memory.take<char>(of_k.steps() * 2 * kTileBytes);
    out[1] = memory.take<char>(of_n.steps() * 2 * kTileBytes);
    out[2] = memory.take<char>(pairs * 2 * kTileBytes);
    out[3] = memory.take<char>(pairs * 2 * kTileBytes);
  };
  char* parts[4];
  carve(sizes, parts);
  Carver memory(scratch(ScratchUse::kCall, sizes.used()));
  carve(memory, parts);
  char *const a_tiles = parts[0], *const b_tiles = parts[1], *const h = parts[2], *const g = parts[3];
  const double h_scale = p.lora.scaling * p.lora.dropout.keep_scale, g_scale = p.lora.scaling;
  const Scale keep_scale(p.lora.dropout.keep_scale);
  for (int64_t first = 0; first < rank; first += kPair) {
    const int64_t ranks = min(kPair, rank - first);
    if (!p.h) fill_factor<WeightIs::kA>(pool, a, first, ranks, of_k, a_tiles);
    if (!p.g) fill_factor<WeightIs::kB>(pool, b, first, ranks, of_n, b_tiles);
    auto low_rank = [&](int64_t begin, int64_t end) {
      const tiles::Session session;
      const LowRankScratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        if (i < pairs && p.h) {
          copy_low_rank_strip(given_h, i, m, first, ranks, h);
        } else if (i < pairs) {
          fill_low_rank_strip<WeightIs::kA>(x, i, m, of_k, a_tiles, h_scale, scratch, h);
        } else if (p.g) {
          copy_low_rank_strip(given_g, i - pairs, m, first, ranks, g);
        } else {
          fill_low_rank_strip<WeightIs::kB>(dy, i - pairs, m, of_n, b_tiles, g_scale, scratch, g);
        }
      }
    };
    pool(2 * pairs, 1, low_rank);
    const auto finish_da = [&](int64_t column, int64_t columns, const char* sums) {
      bfloat16* out = static_cast<bfloat16*>(p.da) + first * p.k + column;
      for (int64_t r = 0; r < ranks; ++r, out += p.k) {
        const char* const row = sums + r / kTileRows * 2 * kTileBytes + r % kTileRows * kRowBytes;
        const F even = keep_scale(load_row(row)), odd = keep_scale(load_row(row + kTileBytes));
        Words::store_pairs(out, Words::round_pair(even, odd), columns);
      }
    };
    const auto finish_db = [&](int64_t row, int64_t rows, const char* sums) {
      for (int64_t tile = 0; tile < 4; ++tile) {  // 16 ranks by even or odd rows of B
        const int64_t r = tile / 2 * kTileRows;
        F v[kLanes];
        for (int64_t i = 0; i < kTileRows; ++i) v[i] = load_row(sums + tile * kTileBytes + i * kRowBytes);
        transpose(v);
        for (int64_t i = 0; i < kTileRows && 2 * i + tile % 2 < rows; ++i)
          many_tokens::store_some(static_cast<bfloat16*>(p.db) + (row + 2 * i + tile % 2) * rank + first + r, v[i],
                                  ranks - r);
      }
    };
    const int64_t k_tasks = ceil_div(p.k, TokenSum::kColumns), n_tasks = ceil_div(p.n, TokenSum::kColumns);
    auto reduce = [&](int64_t begin, int64_t end) {
      const tiles::Session session;
      TokenSum sum;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = (i < k_tasks ? i : i - k_tasks) * TokenSum::kColumns;
        if (i < k_tasks) {
          sum(g, x, m, column, min(TokenSum::kColumns, p.k - column), finish_da);
        } else {
          sum(h, dy, m, column, min(TokenSum::kColumns, p.n - column), finish_db);
        }
      }
    };
    pool(k_tasks + n_tasks, 1, reduce);
  }
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
