// The low-rank intermediates, h = round(scaling · dropout(x) · Aᵀ) and g = round(scaling · dy · B): products like the
// large one, with a factor in the place of W. Each becomes the tiles of one more step of the dense operand.
#pragma once

#include <cstdint>

#include "cpp/cpu/kernels.h"
#include "cpp/cpu/many_tokens/tasks-inl.h"
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

using many_tokens::Scale;

inline constexpr int64_t kPanelBytes = int64_t{1280} << 10;  // of the second-level cache, for a panel

// The dense operand of a batch of tokens, as tiles [slice][pair of tokens][step]. So what an output tile multiplies is
// contiguous, and a slice of all tokens is, too. The last pair has one tile per step if its tokens fill no second.
struct DensePanel {
  char* tiles;
  int64_t tokens;

  int64_t token_tiles() const { return ceil_div(tokens, kTileRows); }
  int64_t pairs() const { return ceil_div(tokens, kPair); }
  int64_t tiles_of(int64_t pair) const { return min(2, token_tiles() - 2 * pair); }
  char* piece(const Slice& s, int64_t pair) const {
    return tiles + (token_tiles() * s.steps_before + 2 * pair * s.steps) * kTileBytes;
  }
};

// Copies elements of tokens with dropout, in memory order, to rows of kMostAlone elements.
inline void drop(const Matrix<bfloat16>& m, int64_t token, int64_t tokens, int64_t begin, int64_t size, bfloat16* out) {
  for (int64_t t = 0; t < tokens; ++t, out += Slices::kMostAlone) {
    for (int64_t first = 0; first < size; first += Mask::kMax) {
      const bfloat16* const row = m.at(token + t, begin + first);
      const int64_t count = min(size - first, Mask::kMax);
      const Mask mask(m.dropout, (token + t) * m.stride + begin + first, count);
      for (int64_t c = 0; c < count; c += kLanes)
        store(out + first + c, mask(many_tokens::load_some(row + c, count - c), c));
    }
  }
}

// Fills tiles with a strip of 32 ranks of a factor, over a slice: A as a, or B as b.
template <WeightIs weight_is>
void fill_factor(const Matrix<bfloat16>& factor, int64_t first_rank, int64_t ranks, const Slice& s, char* out) {
  if constexpr (weight_is == WeightIs::kA) {
    fill_rows<many_tokens::Order::kDecoded>(factor, first_rank, ranks, s.begin, s.size, out);
  } else {
    fill_columns(factor, s.begin, s.size, first_rank, ranks, out, 0);
    const int64_t filled = ceil_div(s.size, kStep), steps = s.element_steps();
    if (filled < steps) __builtin_memset(out + filled * 2 * kTileBytes, 0, static_cast<size_t>(2 * kTileBytes));
  }
}

// Does the same for all slices, one after another.
template <WeightIs weight_is>
void fill_factor(const Pool& pool, const Matrix<bfloat16>& factor, int64_t first_rank, int64_t ranks,
                 const Slices& slices, char* out) {
  auto fill = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Slice s = slices[slices.rank_slices_first() + i];
      fill_factor<weight_is>(factor, first_rank, ranks, s, out + s.begin / kStep * 2 * kTileBytes);
    }
  };
  pool(slices.element_slices(), 1, fill);
}

// What a thread needs for low_rank_sums.
struct LowRankScratch {
  char *sums, *dense;
  bfloat16* dropped;

  LowRankScratch() {
    Carver memory(scratch(ScratchUse::kThread, many_tokens::kTaskBytes));
    sums = memory.take<char>(kOutputTileBytes);
    dense = memory.take<char>(Slices::kMostAlone / kStep * 2 * kTileBytes);
    dropped = memory.take<bfloat16>(kPair * Slices::kMostAlone);
  }
};

// Computes 32 ranks of the low-rank product for a pair of tokens: `memory.sums` is an output tile, summed over all
// slices. The dense pieces come from `panel` or, where it is null, are filled from `in` here.
template <WeightIs weight_is>
void low_rank_sums(const Matrix<bfloat16>& in, int64_t first_token, const DensePanel& panel, int64_t pair,
                   const Slices& slices, const char* factor, const LowRankScratch& memory) {
  const int64_t token = pair * kPair, tokens = min(kPair, panel.tokens - token);
  bool first = true;
  for (int64_t i = 0; i < slices.element_slices(); ++i) {
    const Slice s = slices[slices.rank_slices_first() + i];
    const char* piece = panel.tiles ? panel.piece(s, pair) : memory.dense;
    if (!panel.tiles && in.dropout.active()) {
      drop(in, first_token + token, tokens, s.begin, s.size, memory.dropped);
      fill_dense_pair<weight_is>({memory.dropped, Slices::kMostAlone}, 0, tokens, 0, s.size, memory.dense);
    } else if (!panel.tiles) {
      fill_dense_pair<weight_is>(in, first_token + token, tokens, s.begin, s.size, memory.dense);
    }
    Nothing nothing;
    multiply_output_tile<weight_is>(panel.tiles_of(pair), factor, piece, s.element_steps(), memory.sums, first,
                                    memory.sums, nothing);
    factor += s.element_steps() * 2 * kTileBytes;
    first = false;
  }
}

// Makes one step of the dense operand, which has `tiles` tiles per step, from an output tile of 32 ranks.
template <WeightIs weight_is>
void fill_low_rank(const char* sums, int64_t tiles, double scale, char* step) {
  const Scale scaled(scale);
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const char* row = nullptr;
      const char* next = nullptr;
      if constexpr (weight_is == WeightIs::kA) {  // sums [rank][token]: pairs of ranks
        row = sums + (2 * r / kTileRows * tiles + t) * kTileBytes + 2 * r % kTileRows * kRowBytes;
        next = row + kRowBytes;
      } else {  // sums [token][rank], the even ranks and the odd ones
        row = sums + t * kTileBytes + r * kRowBytes;
        next = row + tiles * kTileBytes;
      }
      store_row(step + t * kTileBytes + r * kRowBytes,
                Words::round_pair(scaled(load_row(row)), scaled(load_row(next))));
    }
  }
}

// Copies up to 32 ranks of `tokens` tokens, at most 16, from a tile that fill_low_rank has filled to rows of `out`.
template <WeightIs weight_is>
void save_low_rank(const char* tile, int64_t tokens, int64_t ranks, bfloat16* out, int64_t stride) {
  F v[kLanes];
  for (int64_t r = 0; r < kTileRows; ++r) v[r] = load_row(tile + r * kRowBytes);
  if constexpr (weight_is == WeightIs::kA) transpose(v);
  for (int64_t t = 0; t < tokens; ++t) Words::store_pairs(out + t * stride, Words::as_words(v[t]), ranks);
}

// Computes h or g for the tokens of a batch, which begin at token `first_token` of `in`. Writes them to the rank steps
// of `panel` and, unless it is null, to `saved` [m, rank].
template <WeightIs weight_is>
void add_low_rank(const Pool& pool, const Matrix<bfloat16>& in, int64_t first_token, const Matrix<bfloat16>& factor,
                  const Lora& lora, const Slices& slices, const DensePanel& panel, char* factor_tiles,
                  bfloat16* saved) {
  const double scale = lora.scaling * in.dropout.keep_scale;
  const DensePanel source{in.dropout.active() ? nullptr : panel.tiles, panel.tokens};
  for (int64_t r = 0; r < lora.rank; r += kPair) {
    fill_factor<weight_is>(pool, factor, r, min(kPair, lora.rank - r), slices, factor_tiles);
    auto body = [&](int64_t begin, int64_t end) {
      const tiles::Session session;
      const LowRankScratch memory;
      for (int64_t pair = begin; pair < end; ++pair) {
        low_rank_sums<weight_is>(in, first_token, source, pair, slices, factor_tiles, memory);
        const Slice s = slices.of_rank(r);
        const int64_t tiles = panel.tiles_of(pair), step = s.element_steps() + (r - s.first_rank) / kStep;
        char* const filled = panel.piece(s, pair) + step * tiles * kTileBytes;
        fill_low_rank<weight_is>(memory.sums, tiles, scale, filled);
        for (int64_t t = 0; saved && t < tiles; ++t) {
          const int64_t token = pair * kPair + t * kTileRows;
          save_low_rank<weight_is>(filled + t * kTileBytes, min(kTileRows, panel.tokens - token),
                                   min(kPair, lora.rank - r), saved + (first_token + token) * lora.rank + r, lora.rank);
        }
      }
    };
    pool(panel.pairs(), 1, body);
  }
}

}  // namespace many_tokens_tiles
}  // namespace
}  // namespace qlora::cpu::QLORA_ISA
